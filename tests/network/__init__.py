"""A network that fails: our TCP proxy, and its own tests."""
