"""What runs inside the virtual machine before the service does. Standard library only."""
