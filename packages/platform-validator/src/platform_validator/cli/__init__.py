"""The command line: `validator`."""

from platform_validator.cli.main import main

__all__ = ["main"]
