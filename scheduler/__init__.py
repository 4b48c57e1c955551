"""Who runs next, where, at whose expense. Knows nothing of HTTP dialects, keys or money."""
