"""A man in the middle, as a process, between the validator's session and a serving Challenge SDK."""
