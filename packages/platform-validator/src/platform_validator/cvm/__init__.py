"""Confidential VMs: the VMM port, the fleet, the quota and the session with the SDK inside."""
