"""The outside languages, and the one Call they all become."""
