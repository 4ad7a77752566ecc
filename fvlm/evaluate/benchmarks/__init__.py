"""Published benchmarks, read as they are published, asked as multiple choice."""
