"""The way out of CVMs, through the whole system."""
