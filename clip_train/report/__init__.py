"""One page about a run, to look at or to mail."""
