# The native twin has the names, types and meaning of the pure one.
from ext._tally_py import CLASSES as CLASSES
from ext._tally_py import Histogram as Histogram
from ext._tally_py import Tally as Tally
