"""Benchmarks of the kernels: the check first, then the clock."""
