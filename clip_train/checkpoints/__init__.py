"""Checkpoints on disk: whole or absent, checked when read, written beside training."""
