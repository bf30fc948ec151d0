"""Weights in other layouts than a run's own."""
