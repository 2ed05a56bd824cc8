"""Every setting, its default and its meaning: TOML, environment, flags; all faults reported at once."""

from platform_validator.config.load import ConfigFaults, load_settings
from platform_validator.config.settings import OPTIONS, Origin, Settings, ValueKeyOrigin

__all__ = ["OPTIONS", "ConfigFaults", "Origin", "Settings", "ValueKeyOrigin", "load_settings"]
