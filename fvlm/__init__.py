"""fVLM: training system for the foveated vision-language model, one token a frame."""

__version__ = "0.1.0"
