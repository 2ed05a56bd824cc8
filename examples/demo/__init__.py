"""The whole system on this machine: `make demo`."""
