"""Local inference servers: the only room (with devices) that touches processes."""
