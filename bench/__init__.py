"""Benchmarks: one file each, all printing the same table; ratios against something real in the same run."""
