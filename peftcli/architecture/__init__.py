"""What a base model is made of, read from its config.json alone."""
