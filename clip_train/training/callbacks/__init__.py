"""What accompanies a run's steps: metrics, checkpoints, validation, guards against what goes wrong."""
