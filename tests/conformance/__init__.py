"""VMMs against the documented behaviour of dstack's versions."""
