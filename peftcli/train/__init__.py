"""`peftcli train`: a recipe becomes a tuned adapter."""
