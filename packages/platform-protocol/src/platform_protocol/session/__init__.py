"""The attested session between a validator (V, dials) and a Challenge SDK (S, serves); no I/O."""
