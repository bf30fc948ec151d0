"""Where the jobs of a `--multirun` run: on this machine, or as jobs of SLURM. Each is a process of its own."""
