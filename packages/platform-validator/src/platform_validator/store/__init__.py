"""What must survive a `kill -9`: the port, its records, and two implementations."""
