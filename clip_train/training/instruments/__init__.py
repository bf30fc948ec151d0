"""Where the time goes: parts of a step, utilisation, what limits a run, profiles."""
