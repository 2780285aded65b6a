"""Compiled programs kept on disk: their text and the compiler's figures, not what could run."""

import base64
import gzip
import hashlib
import importlib.metadata
import json
import logging
import os
import zlib
from pathlib import Path
from typing import Any

from clip_jax.checkpoint import write_atomically

logger = logging.getLogger(__name__)

# Whose versions change what is compiled, as far as they are installed.
_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "libtpu"),
    *("jax-cuda13-plugin", "jax-cuda13-pjrt", "jax-cuda12-plugin", "jax-cuda12-pjrt"),
)
# And whose sources do, of ours.
_ROOMS = ("models", "objectives", "parallel", "tasks", "training")
_FILES = ("planning/compiling.py", "planning/gpus.py", "planning/topology.py")


class CompileCache:
    """Entries by a digest of all that they depend on. Processes may share the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def key(self, content: dict[str, Any]) -> str:
        """content: what is compiled and for what; versions and our sources are added to it."""
        versions = {name: version for name in _PACKAGES if (version := _version(name))}
        flags = {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
        parts = {"content": content, "versions": versions, "flags": flags, "sources": _sources()}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def load(self, key: str) -> dict[str, Any] | None:
        """The entry; None where there is none, or a damaged one."""
        path = self._path(key)
        try:
            # gzip's own checksum tells what is damaged.
            entry: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(path.read_text())))
        except FileNotFoundError:
            return None
        except (OSError, EOFError, zlib.error, ValueError) as error:
            logger.warning("%s is damaged and compiled anew: %s", path, error)
            return None
        return entry

    def save(self, key: str, entry: dict[str, Any]) -> None:
        """Where the folder cannot be written nothing is kept, which is said."""
        content = gzip.compress(json.dumps(entry).encode(), compresslevel=6)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path(key), base64.b64encode(content).decode())
        except OSError as error:
            logger.warning("%s: compiled programs are not kept: %s", self._folder, error.strerror)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key[:32]}.json.gz.b64"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sources() -> str:
    package = Path(__file__).parents[1]
    files = [path for room in _ROOMS for path in sorted((package / room).glob("*.py"))]
    digest = hashlib.sha256()
    for path in [*files, *(package / name for name in _FILES)]:
        digest.update(str(path.relative_to(package)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
