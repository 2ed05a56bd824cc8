"""What challenge authors import; runs inside the CVM."""
