"""Simulated attestation: quotes under a root of this VMM's own. Never a TEE, and named so everywhere."""
