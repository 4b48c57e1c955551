# The native twin has the names, types and meaning of the pure one.
from ext._weighted_semaphore_py import Capacity as Capacity
from ext._weighted_semaphore_py import SemaphoreStats as SemaphoreStats
from ext._weighted_semaphore_py import WeightedSemaphore as WeightedSemaphore
