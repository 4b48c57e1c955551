# The native twin has the names, types and meaning of the pure one.
from ext._body_scan_py import scan as scan
