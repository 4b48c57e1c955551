# The native twin has the names, types and meaning of the pure one.
from ext._json_lines_py import line as line
