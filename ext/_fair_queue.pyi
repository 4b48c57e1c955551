# The native twin has the names, types and meaning of the pure one.
from ext._fair_queue_py import FairQueue as FairQueue
from ext._fair_queue_py import FairQueueStats as FairQueueStats
