"""How a merge is laid out and written, a chunk at a time."""
