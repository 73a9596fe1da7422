"""Define options, check their values, and read them from YAML files and command lines."""

from . import defaults
from .defaults import OPTIONS
from .loader import Config, add_config_arguments, cfg, load_config
from .validation import ConfigError

__all__ = ["OPTIONS", "Config", "ConfigError", "add_config_arguments", "cfg", "load_config"]

defaults._C = cfg  # version 2 stored the global configuration under this name
