"""Challenges: their sources, their instances' lifecycle and the CVMs that wait ready for jobs."""
