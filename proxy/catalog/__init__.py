"""What can be called: models, where each runs, what each is."""
