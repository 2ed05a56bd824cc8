"""A local VMM that speaks dstack's API on machines without TDX. Never a TEE."""
