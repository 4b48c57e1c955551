# The native twin has the names, types and meaning of the pure one.
from ext._occupancy_py import Occupancy as Occupancy
