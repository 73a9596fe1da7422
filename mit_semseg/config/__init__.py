"""Options: their defaults, their checks, and how YAML files and command lines are read."""

from . import defaults
from .check import ConfigError
from .defaults import OPTIONS
from .loader import Config, add_config_arguments, cfg, load_config

__all__ = ["OPTIONS", "Config", "ConfigError", "add_config_arguments", "cfg", "load_config"]

defaults._C = cfg  # name in version 2
