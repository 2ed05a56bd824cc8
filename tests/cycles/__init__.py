"""Thousands of sandboxes made and destroyed by one VMM, and a count of whatever is left."""
