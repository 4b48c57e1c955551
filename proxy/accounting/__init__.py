"""What was used: rows of usage."""
