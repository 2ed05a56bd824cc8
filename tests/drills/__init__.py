"""Drills: the whole system as separate processes, put through one hard thing, and counted afterwards."""
