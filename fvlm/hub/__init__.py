"""Publishing: a Hugging Face folder that stands alone, its model card, and the import of published files."""
