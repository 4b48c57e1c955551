"""Arithmetic and bytes: what must be fast, in Cython, each module with a pure Python twin that is its specification.

Knows nothing of event loops, logging or configuration. `ext.backend` says which twin runs.
"""
