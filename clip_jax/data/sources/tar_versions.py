"""Which version of each file there is now, in few requests: a bucket's are listed by the folder."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from clip_jax.data.record import BadSampleError
from clip_jax.data.sources.files import (
    FileInfo,
    Files,
    info_of,
    is_remote,
    remote_filesystem,
    unreadable,
)
from clip_jax.data.sources.in_threads import in_threads

logger = logging.getLogger(__name__)

UNKNOWN = FileInfo(-1, "")  # of a file that was not looked up
# Of one folder: for more files it is listed, a request per thousand, in place of one for each.
_MOST_SINGLE = 8
_NUM_THREADS = 32


def current_versions(
    paths: Sequence[str], retries: int, at_most: int | None = None
) -> list[FileInfo | None]:
    """Size and version of each file; None where there is no file.

    at_most: requests for files of stores without listings (https); evenly spread over them, the
    others are UNKNOWN. None: all.

    Raises UserError where a store does not answer, or forbids it.
    """
    files = Files(paths, retries)
    versions: list[FileInfo | None] = [UNKNOWN] * len(paths)
    local: list[int] = []
    single: list[int] = []
    folders: dict[str, list[int]] = {}
    for number, path in enumerate(paths):
        if is_remote(path):
            folders.setdefault(path.rpartition("/")[0], []).append(number)
        else:
            local.append(number)
    found = in_threads(lambda number: _version(files, number), local)
    for number, version in zip(local, found, strict=True):
        versions[number] = version
    for folder, numbers in folders.items():
        listing = None
        if len(numbers) > _MOST_SINGLE and not folder.startswith("http"):
            listing = _listing(folder)
        if listing is None:
            single.extend(numbers)
        else:
            for number in numbers:
                versions[number] = listing.get(paths[number].rpartition("/")[2])
    if at_most is not None and len(single) > at_most:
        last = len(single) - 1
        places = {round(step * last / (at_most - 1)) for step in range(at_most)}
        single = [single[place] for place in sorted(places)]
    if single:
        with ThreadPoolExecutor(min(_NUM_THREADS, len(single))) as pool:
            answers = pool.map(lambda number: _version(files, number), single)
            for number, version in zip(single, answers, strict=True):
                versions[number] = version
    return versions


def _version(files: Files, number: int) -> FileInfo | None:
    try:
        return files.info(number)
    except BadSampleError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise unreadable(files.path(number), error) from None


def _listing(folder: str) -> dict[str, FileInfo] | None:
    """The files of a remote folder by name, or None where it cannot be listed."""
    filesystem = remote_filesystem(folder)
    try:
        details = filesystem.ls(folder, detail=True)
    except FileNotFoundError:
        return {}
    except Exception as error:  # noqa: BLE001 - each store has its own tree of errors
        logger.warning(
            "%s cannot be listed (%s): its files are asked for one by one", folder, error
        )
        return None
    return {
        item["name"].rpartition("/")[2]: info_of(item)
        for item in details
        if item.get("type") == "file" and isinstance(item.get("size"), int)
    }
