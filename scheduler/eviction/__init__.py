"""Eviction policies, one a file; `scheduler.eviction.base` says what each must answer."""
