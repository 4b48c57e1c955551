# The native twin has the names, types and meaning of the pure one.
from ext._rate_counters_py import RateCounters as RateCounters
from ext._rate_counters_py import Remaining as Remaining
