"""Real processes, really killed: `python -m tests.chaos`."""
