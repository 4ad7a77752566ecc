"""The figures of a study, from its CSVs alone."""
