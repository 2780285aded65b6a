"""The one exception that the command line turns into a single line and exit code 2."""


class UserError(ValueError):
    """Something the user can mend: the message is one line with the numbers and the remedy."""


class ConfigError(UserError):
    """A config value that is unknown, of the wrong type, out of range or at odds with another."""
