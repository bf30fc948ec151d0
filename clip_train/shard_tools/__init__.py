"""Shards as files: making, indexing, checking, describing and timing them. The library behind `clip-shards`."""
