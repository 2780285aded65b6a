"""The exceptions that the command line turns into a single line and an exit code."""


class UserError(ValueError):
    """Something the user can mend: the message is one line with the numbers and the remedy."""

    exit_code = 2


class ConfigError(UserError):
    """A config value that is unknown, of the wrong type, out of range or at odds with another."""


class TemporaryError(UserError):
    """What may have passed when the same command runs again, as a store that does not answer."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


def nearest_multiples(number: int, of: int) -> str:
    """`24 or 36`: of 12, next to 32; of fewer than 12 `12`."""
    below = number // of * of
    return f"{below} or {below + of}" if below else f"{of}"
