"""One dialect of the outside world each; none knows the scheduler."""
