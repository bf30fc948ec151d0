"""Retrieval on validation sets, exact and sharded over ranks."""
