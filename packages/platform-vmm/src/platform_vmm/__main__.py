"""`python -m platform_vmm`."""

from platform_vmm.cli import main

main()
