"""Options: their defaults, their checks, and how YAML files and command lines are read."""

from .check import ConfigError
from .loader import Config, add_config_arguments, cfg, load_config

__all__ = ["Config", "ConfigError", "add_config_arguments", "cfg", "load_config"]
