"""Search in embeddings: an index, filters, and results as people see them."""
