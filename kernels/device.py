"""Functions that kernels of several ops share, compiled into them."""

from __future__ import annotations

import os

import triton
import triton.language as tl

# the interpreter multiplies bfloat16 wrongly: there, operands are widened first (exact: products of bf16 fit fp32)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b):
    """a · b, accumulated in float32; float32 operands go through the tensor cores in three parts, exact to ~2⁻²²."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3", out_dtype=tl.float32)
