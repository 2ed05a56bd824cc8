"""The daemon over HTTP: the listener for CVMs and probes, and the operator's API."""
