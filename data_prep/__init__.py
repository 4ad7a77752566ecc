"""Data preparation: drawing synthetic clips, and turning media files into training shards."""
