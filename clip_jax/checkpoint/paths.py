"""Where the files of a run lie: a local folder, by pathlib, or a bucket, by fsspec.

Why fsspec and not etils.epath, through which Orbax reaches buckets: epath turns to TensorFlow for
gs:// and s3:// where that is installed and to fsspec where it is not, keeps listings that other
processes have made old, asks "is it there?" in a way that takes a store without an answer for an
empty one, cannot create an object only where there is none, which the lock of a run needs, and
knows gs, s3, az and hf alone. The data is read through fsspec too: one client for each store, one
way to give it credentials.
"""

import fnmatch
import io
import os
import re
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any, TypeAlias

from clip_jax.config import TemporaryError, UserError

# The extra that installs what fsspec needs for a scheme.
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}


# Answers of stores that the next try gets too.
_REFUSED = re.compile(
    r"Permission|Forbidden|Unauthori[sz]ed|Denied|[Cc]redential|NotFound|NoSuchBucket|InvalidBucket"
    r"|cannot do it|in the way|\b40[0134]\b"
)


class BucketPath:
    """An object of a bucket, or what lies below a name: what a run needs of pathlib's Path.

    Objects are written whole or not at all; folders need not be made, and are there as long as
    something lies in them. Raises FileNotFoundError where an object that is read is not there, and
    UserError in one line for all that a store may answer else: a store that does not answer is
    never taken for an empty one. Not an os.PathLike: `open` and `Path` would take its URL for a
    relative local name and make folders of it.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"BucketPath({self._url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BucketPath) and self._url == other._url

    def __hash__(self) -> int:
        return hash(self._url)

    def __truediv__(self, name: str) -> "BucketPath":
        return BucketPath(f"{self._url}/{name}")

    @property
    def name(self) -> str:
        return self._url.rpartition("/")[2]

    @property
    def parent(self) -> "BucketPath":
        return BucketPath(self._url.rpartition("/")[0])

    def exists(self) -> bool:
        return self._kind() is not None

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def iterdir(self) -> Iterator["BucketPath"]:
        """What lies in the folder, in order of names; nothing where there is no folder."""
        try:
            found = self._ask("read", "ls", detail=False)
        except FileNotFoundError:
            return
        names = {str(path).rstrip("/").rpartition("/")[2] for path in found}
        # Some stores list the folder itself where someone has made one by hand.
        for name in sorted(names - {self.name, ""}):
            yield self / name

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """What lies in the folder and has such a name: no pattern with a slash."""
        assert "/" not in pattern, pattern
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def mkdir(self, *, parents: bool = True, exist_ok: bool = True) -> None:
        """Nothing: a folder comes with its first object."""

    def read_bytes(self) -> bytes:
        data: bytes = self._ask("read", "cat_file")
        return data

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def open(self, mode: str = "r", encoding: str = "utf-8") -> IO[Any]:
        """The whole object, for reading."""
        if mode == "rb":
            return io.BytesIO(self.read_bytes())
        if mode == "r":
            return io.StringIO(self.read_text(encoding))
        raise io.UnsupportedOperation(
            f"{self} cannot be opened as {mode!r}: objects are written whole, by write_text"
        )

    def write_bytes(self, data: bytes, *, exclusive: bool = False) -> None:
        """exclusive: only where there is no such object; FileExistsError where there is one."""
        if exclusive:
            self._ask("written", "pipe_file", data, mode="create")
        else:
            self._ask("written", "pipe_file", data)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        self.write_bytes(text.encode(encoding))

    def upload(self, file: Path) -> None:
        """Writes the content of a local file."""
        self._ask("written", "put_file", source=file)

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._ask("deleted", "rm_file")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def modified(self) -> datetime | None:
        """When the object was written last, by the clock of the store; None if it does not say."""
        try:
            time: datetime = self._ask("read", "modified")
        except NotImplementedError:
            return None
        return time

    def _kind(self) -> str | None:
        try:
            kind: str = self._ask("read", "info")["type"]
        except FileNotFoundError:
            return None
        return kind

    def _ask(
        self, action: str, method: str, *args: Any, source: Path | None = None, **kwargs: Any
    ) -> Any:
        # By position: each store has its own names of the same arguments.
        filesystem, path = _filesystem(self._url)
        before = [] if source is None else [str(source)]
        try:
            return getattr(filesystem, method)(*before, path, *args, **kwargs)
        except NotImplementedError:
            if method == "modified":
                raise
            reason = "that kind of store cannot do it"
        except FileExistsError:
            if kwargs.get("mode") == "create":
                raise
            reason = "it is in the way"
        except Exception as error:  # each store has its own tree of errors
            if isinstance(error, FileNotFoundError) and action != "written":
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        kind = UserError if _REFUSED.search(reason) else TemporaryError
        raise kind(
            f"{self} cannot be {action}: {reason}; check the bucket's name and the access to it"
        )


AnyPath: TypeAlias = Path | BucketPath


def any_path(path: AnyPath | str) -> AnyPath:
    """A URL as the path in its bucket, anything else as an absolute local path."""
    if isinstance(path, BucketPath):
        return path
    if isinstance(path, str) and "://" in path:
        scheme, _, rest = path.partition("://")
        return Path(rest) if scheme in ("file", "local") else BucketPath(path)
    return Path(path).expanduser().absolute()


def write_atomically(path: AnyPath, text: str) -> None:
    """The whole text or the old file: never a part."""
    if isinstance(path, BucketPath):
        path.write_text(text)
        return
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        os.fchmod(handle, 0o666 & ~_umask())  # mkstemp's is for nobody else, a run may be shared
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _umask() -> int:
    """That of the process, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _filesystem(url: str) -> tuple[Any, str]:  # fsspec has no types
    """The fsspec filesystem of a URL, and the name in it.

    Raises UserError where its package is missing.
    """
    import fsspec.config
    from fsspec.core import url_to_fs

    # Orbax's own gcsfs, by epath, must not go by old listings either: after one, what another
    # process writes stays unseen.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    try:
        filesystem, path = url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:  # ValueError: no such protocol
        extra = _EXTRAS.get(url.split("://", 1)[0])
        remedy = f"pip install 'clip-jax-training[{extra}]'" if extra else "is the URL right?"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{url} cannot be reached: {reason}; {remedy}") from None
    return filesystem, path
