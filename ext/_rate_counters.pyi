# The native twin has the names, types and meaning of the pure one.
from ext._rate_counters_py import Grant as Grant
from ext._rate_counters_py import Meter as Meter
from ext._rate_counters_py import RateCounters as RateCounters
from ext._rate_counters_py import Refusal as Refusal
from ext._rate_counters_py import Remaining as Remaining
