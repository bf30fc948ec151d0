"""The command-line programs: Hydra in, library calls, exit codes out."""
