"""Grids of sizes, budgets and architectures, and the laws that are fitted to them."""
