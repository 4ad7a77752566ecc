"""From the records of runs to figures and reports; reads files only, never a model."""
