"""Sweeps: many runs of `clip-train` in one folder, over a grid or by a study of Optuna's; docs/sweeps.md."""
