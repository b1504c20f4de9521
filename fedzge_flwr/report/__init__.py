"""One page of a run, or of several that are compared."""
