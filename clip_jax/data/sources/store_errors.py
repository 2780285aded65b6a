"""What the errors of stores mean: whether another attempt may help, and whether a file is gone."""

# Errors that another attempt does not change.
_LASTING = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    TypeError,
    ValueError,
    AttributeError,
)
_PASSING_STATUS = (408, 425, 429)  # of HTTP's client errors: timeout, too early, too many requests
_GONE_STATUS = (404, 410)


class NoRangesError(ValueError):
    """A server sent more than the byte range that it was asked for."""

    def __init__(self) -> None:
        super().__init__("the server ignores byte ranges, so nothing can be read out of it")


def real_error(error: Exception, url: str) -> Exception:
    """What happened, where fsspec calls every failure to look up a web address "not found"."""
    cause = error.__cause__
    if (
        url.startswith(("http://", "https://"))
        and isinstance(error, FileNotFoundError)
        and isinstance(cause, Exception)
        and not isinstance(cause, FileNotFoundError)
        and _status(cause) not in _GONE_STATUS
    ):
        return cause
    return error


def may_pass(error: Exception) -> bool:
    """Whether another attempt may succeed: no answer, a server's error, an I/O error."""
    status = _status(error)
    if status is not None and 400 <= status < 500:
        return status in _PASSING_STATUS
    return not isinstance(error, _LASTING)


def _status(error: Exception) -> int | None:
    """Of HTTP, as the stores' clients have it."""
    for name in ("status", "code"):
        if isinstance(status := getattr(error, name, None), int):
            return status
    return None
