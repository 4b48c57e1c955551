"""Several processes that serve, and the one that decides."""
