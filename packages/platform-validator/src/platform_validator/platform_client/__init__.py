"""The Platform API, seen from here."""
