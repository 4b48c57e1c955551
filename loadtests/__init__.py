"""Load: locust scenarios for a running vramp, and benchmarks that print and assert nothing."""
