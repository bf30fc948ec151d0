"""Shards -> order -> bytes -> pixels and tokens -> batches."""
