"""What a run will need, before it is queued: memory, traffic, time and cost. The library behind `clip-plan`."""
