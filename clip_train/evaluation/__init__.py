"""What `clip-eval` does, and training between its steps: zero-shot, retrieval, probes, moderation, ranking."""
