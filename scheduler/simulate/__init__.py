"""The scheduler's core in virtual time: traces, engines that are only numbers, bounds, reports."""
