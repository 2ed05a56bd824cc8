"""Attestation over real quotes and over generated ones, under a private root that only tests know."""
