"""Ceilings on the largest error against float64, relative to the largest value; change one only with its reason."""

FORWARD = {"float64": 1e-12, "float32": 5e-6, "float16": 3e-3, "bfloat16": 2e-2}
BACKWARD = {"float64": 1e-11, "float32": 2e-5, "float16": 6e-3, "bfloat16": 4e-2}
