"""What a checkpoint can do: losses, multiple choice, attention maps, in the three modes."""
