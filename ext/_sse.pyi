# The native twin has the names, types and meaning of the pure one.
from ext._sse_py import EventScanner as EventScanner
