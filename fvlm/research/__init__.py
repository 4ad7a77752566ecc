"""From the records of runs and studies to verdicts, fits, figures and reports."""
