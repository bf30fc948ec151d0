"""Embeddings of whole sets on disk: made part by part, and read."""
