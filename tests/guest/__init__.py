"""What needs another kernel's settings than this machine has, run as root in a virtual machine of QEMU's."""
