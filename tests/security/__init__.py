"""What docs/security.md says, shown: each claim of an attacker has its test."""
