"""Where to: candidates in order, each with a reason."""
