"""Is it better, by how much, and what did it forget."""
