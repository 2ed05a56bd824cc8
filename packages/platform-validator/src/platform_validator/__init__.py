"""The daemon that claims evaluation jobs, runs each in a confidential VM and submits the result."""
