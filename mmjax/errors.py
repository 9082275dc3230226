"""Errors that several parts of the library share."""


class ConfigError(ValueError):
    """A model configuration that cannot be built; the message names the key and the way out."""
