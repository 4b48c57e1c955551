"""The management API on its own listener."""
