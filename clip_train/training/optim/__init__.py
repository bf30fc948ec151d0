"""The optimizer, its schedule and state, and what is averaged of the weights."""
