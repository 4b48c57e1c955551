# The native twin has the names, types and meaning of the pure one.
from ext._body_scan_py import read_answer as read_answer
from ext._body_scan_py import scan as scan
