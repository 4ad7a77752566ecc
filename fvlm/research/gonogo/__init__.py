"""The check list before a long run."""
