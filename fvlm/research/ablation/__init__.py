"""Questions, the arms that answer them, and verdicts by rules stated beforehand."""
