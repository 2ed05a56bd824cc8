"""The daemon: the startup sequence in its order, the supervised loops, the drain."""

from platform_validator.daemon.run import run

__all__ = ["run"]
