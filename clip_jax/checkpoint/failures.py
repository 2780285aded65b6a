"""What a save that failed says of its cause."""

import errno
import os

# What Orbax and TensorStore raise for a disk that is full, a bucket that is gone, a barrier in
# which another process did not appear.
FAILURES = (OSError, ValueError, RuntimeError)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_ROOM_TEXTS = tuple(os.strerror(number) for number in _NO_ROOM)


def is_full(error: BaseException) -> bool:
    """Whether there is no room left, or none for this user."""
    is_errno = getattr(error, "errno", None) in _NO_ROOM
    return is_errno or any(text in str(error) for text in _NO_ROOM_TEXTS)


def is_refused(error: BaseException) -> bool:
    """Whether the next try would be refused too."""
    return isinstance(error, PermissionError) or "PERMISSION_DENIED" in str(error)
