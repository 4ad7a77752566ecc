"""What a checkpoint can do: losses, multiple choice, captions, benchmarks, attention maps, in the three modes."""
