"""Whether a CVM is what it says: quote, event log, and the policy of the level in force."""
