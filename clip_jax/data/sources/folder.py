"""Folders of images: with a .txt beside each, or sorted into folders named by their class."""

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from clip_jax.config.errors import UserError
from clip_jax.data.record import Record
from clip_jax.data.sources.caption_values import (
    captions_of_values,
    check_captions,
    class_captions,
)
from clip_jax.data.sources.files import is_remote
from clip_jax.data.sources.path_files import PathFiles
from clip_jax.data.sources.stored_arrays import StoredArray

logger = logging.getLogger(__name__)

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


class FolderSource:
    """The images (jpg, jpeg, png, webp) below a folder, sorted by path, folder by folder.

    Where images have a .txt of the same name, its whole text is the caption, as in a tar, and
    images without one are left out and counted; such a .txt must stand beside most of them. Where
    no image has one, each must lie in a folder below `path`: the name of the topmost, underscores
    as blanks, is its class, and `templates` filled with it are its captions.

    The folder is listed at each start, into a file of index_dir that is mapped into memory: workers
    and threads share it. Pickles to little. Raises UserError where there is no such folder, no
    image, or some images have neither text nor class.
    """

    def __init__(
        self,
        path: str,
        index_dir: Path,
        *,
        templates: Sequence[str] = ("{}",),
        retries: int = 3,
    ) -> None:
        if is_remote(path):
            raise UserError(
                f"{path}: a folder of images must be local; of a bucket read tars or parquet files"
            )
        self._root = os.path.abspath(os.path.expanduser(path))
        if not os.path.isdir(self._root):
            raise UserError(f"{self._root}: no such folder")
        self._templates = tuple(templates)
        self._files = PathFiles(retries)
        index_dir.mkdir(parents=True, exist_ok=True)
        with_text = _list(self._root, index_dir, with_text=True)
        listing = with_text
        self.has_classes = with_text.kept == 0
        self.num_skipped = with_text.total - with_text.kept  # images without a text
        if with_text.total == 0:
            raise UserError(
                f"{self._root}: no image (jpg, jpeg, png, webp) among its {with_text.others} files"
            )
        if self.has_classes:
            if with_text.at_top:
                raise UserError(
                    f"{self._root}: {with_text.at_top} of {with_text.total} images lie in it "
                    "without a .txt beside them, so they have no caption; add NAME.txt to each "
                    "NAME.jpg, or sort the images into folders named by their class"
                )
            self.num_skipped = 0
            listing = _list(self._root, index_dir, with_text=False)
        elif self.num_skipped > with_text.kept:
            raise UserError(
                f"{self._root}: {with_text.kept} images with a .txt beside them and "
                f"{self.num_skipped} without; either all have one, or none and their folders are "
                "classes"
            )
        elif self.num_skipped:
            logger.warning(
                "%s: %d images without a .txt left out, %d kept",
                path,
                self.num_skipped,
                with_text.kept,
            )
        self._names, self._ends = listing.names, listing.ends
        check_captions(self, self._root)

    def __len__(self) -> int:
        return len(self._ends())

    def __getitem__(self, index: int) -> Record:
        """Read an image and its caption. Raises IndexError and BadSampleError."""
        name = self._name(index)
        captions = self._captions(name)
        return Record(self._files.read(os.path.join(self._root, name)), captions, name)

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of an image. Raises as reading it does."""
        return self._captions(self._name(index))

    def shard(self, index: int) -> str:
        """The folder that holds an image."""
        return os.path.dirname(os.path.join(self._root, self._name(index)))

    def locate(self, index: int) -> str:
        """An image's path."""
        return os.path.join(self._root, self._name(index))

    def _name(self, index: int) -> str:
        ends = self._ends()
        if not 0 <= index < len(ends):
            raise IndexError(f"sample {index} of {len(ends)}")
        start = int(ends[index - 1]) if index else 0
        return os.fsdecode(self._names()[start : int(ends[index])].tobytes())

    def _captions(self, name: str) -> tuple[str, ...]:
        if self.has_classes:
            prompts = class_captions(name.split(os.sep, 1)[0], self._templates)
            return captions_of_values([prompts], ["its folder's name"])[0]
        text = self._files.read(os.path.join(self._root, os.path.splitext(name)[0] + ".txt"))
        return captions_of_values([text.removeprefix(b"\xef\xbb\xbf")], ["its .txt"])[0]


class _Listing(NamedTuple):
    """What is below a folder."""

    names: StoredArray  # uint8: the kept images' paths below it, one after another
    ends: StoredArray  # int64 [n]: where each ends
    kept: int
    total: int  # images
    at_top: int  # images without a text right in the folder
    others: int  # files that are no images


def _list(root: str, index_dir: Path, *, with_text: bool) -> _Listing:
    """List the images below a folder; with `with_text` keep those that have a .txt beside them.

    The listing is named by its content: processes that list the same folder share it.
    """
    kept = total = at_top = others = position = 0
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(dir=index_dir, prefix=".listing-") as temporary:
        names_file, ends_file = Path(temporary, "names"), Path(temporary, "ends")
        with names_file.open("wb") as names, ends_file.open("wb") as ends:
            for name, images, texts, num_others in _walk(root):
                chosen = [file for file in images if os.path.splitext(file)[0] in texts]
                total += len(images)
                others += num_others
                at_top += 0 if name else len(images) - len(chosen)
                chosen = chosen if with_text else images
                kept += len(chosen)
                position = _write(name, chosen, position, names, ends, digest)
        identity = digest.hexdigest()[:32]
        names_file = names_file.replace(index_dir / f"listing-{identity}-names")
        ends_file = ends_file.replace(index_dir / f"listing-{identity}-ends")
    return _Listing(
        StoredArray(names_file, "u1"), StoredArray(ends_file, "<i8"), kept, total, at_top, others
    )


def _write(
    folder: str,
    files: Sequence[str],
    position: int,
    names: IO[bytes],
    ends: IO[bytes],
    digest: Any,  # of hashlib
) -> int:
    """Add a folder's files to a listing of `position` bytes of names; return the bytes then."""
    if not files:
        return position
    paths = [os.fsencode(os.path.join(folder, file)) for file in files]
    lengths = np.array([len(path) for path in paths], np.int64)
    joined, stretches = b"".join(paths), (position + np.cumsum(lengths)).astype("<i8").tobytes()
    names.write(joined)
    ends.write(stretches)
    digest.update(joined + stretches)
    return position + int(lengths.sum())


def _walk(root: str) -> Iterator[tuple[str, list[str], set[str], int]]:
    """Each folder below `root`: its path, sorted images, stems of texts, number of other files.

    Hidden files and folders are passed over; links to folders are followed, but not in a circle.
    """
    pending = [""]
    while pending:
        folder = pending.pop()
        images, texts, folders, others = [], set(), [], 0
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                stem, ending = os.path.splitext(entry.name)
                if entry.is_dir():
                    if not (entry.is_symlink() and _leads_back(entry.path)):
                        folders.append(os.path.join(folder, entry.name))
                elif ending.lower() in _ENDINGS:
                    images.append(entry.name)
                elif ending == ".txt":
                    texts.add(stem)
                    others += 1
                else:
                    others += 1
        yield folder, sorted(images), texts, others
        pending.extend(sorted(folders, reverse=True))


def _leads_back(link: str) -> bool:
    """Whether a link leads to a folder that it lies in."""
    target = os.path.realpath(link)
    return os.path.realpath(os.path.dirname(link)).startswith(target)
