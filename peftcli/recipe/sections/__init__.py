"""The sections of a recipe, a file each: every key with its default, limit and description."""
