"""What compilers say when they give up, in one line."""

import re

from clip_jax.config.errors import UserError

# "Used 21.95G of 15.48G hbm", "the total memory required for HLO temporaries (571.88G) exceeds
# available HBM (15.75G)". Units of 1024.
_SIZE = r"([\d.]+)([KMGT]?)"
_TOO_LARGE = (
    re.compile(rf"Used {_SIZE}i?B? of {_SIZE}i?B? hbm", re.IGNORECASE),
    re.compile(rf"\({_SIZE}i?B?\) exceeds available HBM \({_SIZE}i?B?\)", re.IGNORECASE),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class DoesNotFit(UserError):  # noqa: N818 - a finding of a plan, which goes on with others
    """A step that needs more memory than a device has, in bytes."""

    def __init__(self, message: str, *, needed_bytes: int, has_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes, self.has_bytes = needed_bytes, has_bytes


def does_not_fit(device: str, *, needed_bytes: int, has_bytes: int, share: str = "") -> DoesNotFit:
    """device: its kind. share: of its memory that `has_bytes` is, where it is not all."""
    return DoesNotFit(
        f"the step needs {needed_bytes / 1e9:.1f} GB of a device's memory, {device} has "
        f"{has_bytes / 1e9:.1f}{share}; more microbatches, --config.remat=dots or full, a larger "
        "fsdp axis of --config.mesh or a smaller --config.global_batch_size need less",
        needed_bytes=needed_bytes,
        has_bytes=has_bytes,
    )


def sizes_too_large(message: str) -> tuple[int, int] | None:
    """Bytes that a program needs and that there are, where a TPU's compiler says so."""
    for pattern in _TOO_LARGE:
        if match := pattern.search(message):
            needed, needed_unit, has, has_unit = match.groups()
            return (
                int(float(needed) * _UNITS[needed_unit.upper()]),
                int(float(has) * _UNITS[has_unit.upper()]),
            )
    return None


def one_line(error: Exception | str) -> str:
    """The first sentences of a message: what follows is for the compiler's authors."""
    text = str(error).split("\n\n")[0]
    return " ".join(text.split())[:300].rstrip(" .")
