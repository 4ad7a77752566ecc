"""The whole road by one command."""
