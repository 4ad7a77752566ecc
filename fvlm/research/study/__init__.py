"""Studies: lists of runs that differ in configuration, carried out as processes, and their tables."""
