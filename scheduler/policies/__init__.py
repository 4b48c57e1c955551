"""Ordering policies, one a file; `scheduler.ordering` says what each must answer."""
