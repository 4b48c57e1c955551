"""Who may: keys, access, limits."""
