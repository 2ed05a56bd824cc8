"""The real validator code on a virtual clock, among twins that misbehave by a seeded plan."""
