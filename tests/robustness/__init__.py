"""The catalogue of failures (docs/testing.md), a file a case or two; much of it is tested beside its part."""
