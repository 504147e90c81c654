"""Measuring the kernels: what the compiler makes of them, the least time that hardware allows, and what they take."""
