"""Language-model head and cross-entropy in one."""

from .op import LinearCrossEntropy, linear_cross_entropy

__all__ = ["LinearCrossEntropy", "linear_cross_entropy"]
