"""Listeners, the journey of one request, drain."""
