# The native twin has the names, types and meaning of the pure one.
from ext._backlog_py import Backlog as Backlog
