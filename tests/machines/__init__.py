"""State machines over the parts that must never be wrong, each proved by faults put in on purpose."""
