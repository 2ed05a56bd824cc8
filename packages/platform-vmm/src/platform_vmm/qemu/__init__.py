"""Guests that are virtual machines of QEMU's."""
