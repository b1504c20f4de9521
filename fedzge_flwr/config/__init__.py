"""The settings of a run, of a node and of its owner: types and ranges, no names of parts."""
