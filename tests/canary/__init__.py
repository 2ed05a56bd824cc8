"""Secrets seeded everywhere, and looked for everywhere else."""
