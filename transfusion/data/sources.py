"""A source is a map-style sequence: `len(source)`, `source[i]`, and what it had to skip, by name and reason.

    image source   source[i] -> CaptionedImage     FolderSource, EmojiSource (emoji.py), HubImages (hub.py)
    text source    source[i] -> str                PydocTextSource, TextFolderSource (texts.py), HubTexts (hub.py)

The split is decided by a hash of each sample's name, or of a text's content, so that a sample stays on its side when
others are added or removed, on every machine. What is too large to list is a stream (streams.py).
"""

import functools
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

from transfusion.optional import require

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

Split = Literal["train", "test", "all"]
Skipped = tuple[str, str]
_ORIENTATION, _QUARTER_TURNS = 0x0112, (5, 6, 7, 8)  # of EXIF
_WIDTH, _HEIGHT = 0x0100, 0x0101  # of TIFF
_PNG, _XMP, _TAIL = b"\x89PNG\r\n\x1a\n", b"XML:com.adobe.xmp", 1 << 16  # bytes at a file's end


class SampleError(ValueError):
    """One sample cannot be read. The loader skips it, counts it and names it; the run continues."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[type["SampleError"], Skipped]:  # so that it can be pickled, by worker processes
        return SampleError, (self.name, self.reason)


@functools.cache
def warn_skipped(place: Path, name: str, reason: str) -> None:
    """Warns once per process about what is not a sample in `place`, although each split reads it again."""
    logger.warning("skipped %s: %s", name, reason)


@dataclass(frozen=True)
class FileSlice:
    """`size` bytes of a file from `offset` on, or all of it; nothing is read before `read()`."""

    path: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The bytes. Raises `OSError`, also where the file ends before them."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            content = file.read() if self.size is None else file.read(self.size)
        if self.size is not None and len(content) < self.size:
            raise OSError(f"{self.path} ends after {len(content)} of {self.size} bytes")
        return content


@dataclass(frozen=True)
class CaptionedImage:
    """One sample: a caption, an image as a file's bytes or as pixels, and the name that messages use for it.

    An edit also has the image `before`, which the caption says how to change. Nothing is read or decoded until it is
    asked for; a file that cannot be read is a `SampleError` then.
    """

    caption: str
    content: "bytes | FileSlice | Image.Image"
    name: str
    before: "CaptionedImage | None" = None

    @property
    def pictures(self) -> "tuple[CaptionedImage, ...]":
        """Its pictures, in the order of the document."""
        return (self,) if self.before is None else (self.before, self)

    @property
    def image(self) -> "Image.Image":
        """The RGB image, upright, on white where it is transparent."""
        if isinstance(self.content, bytes | FileSlice):
            return decode_rgb(self.read(), self.name)
        return self.content

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of `image`, from the file's header where there is one."""
        return upright_size(self.content if isinstance(self.content, FileSlice) else self.image, self.name)

    @property
    def key(self) -> str:
        """sha256 of the content: two samples with one key are the same picture."""
        content = self.content
        if isinstance(content, bytes | FileSlice):
            return hashlib.sha256(self.read()).hexdigest()
        return hashlib.sha256(repr((content.mode, content.size)).encode() + content.tobytes()).hexdigest()

    def read(self) -> bytes:
        """The file's bytes."""
        assert isinstance(self.content, bytes | FileSlice)
        try:
            return self.content.read() if isinstance(self.content, FileSlice) else self.content
        except OSError as error:
            raise SampleError(self.name, f"unreadable file ({error})") from error


class ImageSource(Protocol):
    """Captioned images. The list is known without reading an image; reading one may raise `SampleError`.

    A source with edits also lists them, as `edits`: {index: name of the image `before`}.
    """

    names: list[str]
    captions: list[str]
    skipped: list[Skipped]

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> CaptionedImage:
        """Sample `index`, its image not decoded yet."""


def edits_of(source: ImageSource) -> Mapping[int, str]:
    """`source.edits`, empty if it lists none."""
    edits: Mapping[int, str] = getattr(source, "edits", {})
    return edits


def held_out(keys: Iterable[str], fraction: float) -> set[str]:
    """{key : sha256(key) / 2^256 < fraction}, but at least one of two or more keys, and never all of them.

    So a small set has both splits, and a single key is for training. Where the hashes alone would hold none out, the
    key with the smallest hash is held out; that may become another one when keys are added.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the held-out fraction must be in [0, 1), got {fraction}")
    # a file's name may not be Unicode
    hashes = {key: hashlib.sha256(key.encode(errors="surrogatepass")).digest() for key in keys}
    chosen = {key for key, digest in hashes.items() if int.from_bytes(digest[:8], "big") < fraction * 2**64}
    by_hash = sorted(hashes, key=lambda key: hashes[key])
    if not chosen and fraction > 0:
        chosen = set(by_hash[:1])
    return chosen - set(by_hash[-1:]) if len(chosen) == len(hashes) else chosen


def in_split(key: str, split: Split, test_keys: set[str]) -> bool:
    """Whether `key` belongs to `split`, where `test_keys` are held out."""
    if split not in ("train", "test", "all"):
        raise ValueError(f"split must be 'train', 'test' or 'all', got {split!r}")
    return split == "all" or (key in test_keys) == (split == "test")


def is_unicode(text: str) -> bool:
    """Whether it has no unpaired surrogate (half an emoji, which JSON can contain)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or contains NUL
        return False


class _Entry(NamedTuple):
    """A line of captions.jsonl."""

    image: str
    caption: str
    before: str = ""


def _families(entries: Iterable[_Entry]) -> dict[str, str]:
    """{file: the first, by name, of the files that edits connect it with}, so that no picture is on both sides of a
    split."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    for entry in entries:
        ends = root(entry.image), root(entry.before or entry.image)
        parent[max(ends)] = min(ends)
    return {name: root(name) for name in list(parent)}


class EmptySplitError(ValueError):
    """A source has samples, but none in the split that was asked for."""


class FolderSource:
    """Captioned images of a folder: each line of `captions.jsonl` is {"image": "a/b.jpg", "caption": "..."}.

    An edit is {"source_image": "a/b.jpg", "caption": "make it red", "image": "a/c.jpg"}.

    An entry that is malformed, or whose image is missing or is no image by its header, is skipped: warned about,
    and kept with its reason in `skipped`. A file whose pixels turn out to be corrupt raises `SampleError` when they
    are decoded. `test_fraction` of the image files are held out; all captions of a file stay together, and so do all
    files that edits connect. Raises `ValueError` if there is no captions file, or nothing valid is left.
    """

    def __init__(self, path: str | Path, split: Split = "train", test_fraction: float = 0.05) -> None:
        self.path = Path(path)
        self.skipped: list[Skipped] = []
        entries = self._read_captions()
        if not entries:
            raise ValueError(
                f"{self.path} has no valid captioned image ({len(self.skipped)} skipped"
                + (f", the first: {': '.join(self.skipped[0])}" if self.skipped else "")
                + '); expected captions.jsonl with one {"image": "relative/path.jpg", "caption": "..."} per line'
            )
        family = _families(entries)
        test_names = held_out(family.values(), test_fraction)
        chosen = [entry for entry in entries if in_split(family[entry.image], split, test_names)]
        if not chosen:
            raise EmptySplitError(
                f"the {split} split of {self.path} is empty: {len(entries)} captioned image(s) in all"
            )
        self.names, self.captions = [entry.image for entry in chosen], [entry.caption for entry in chosen]
        self.edits = {index: entry.before for index, entry in enumerate(chosen) if entry.before}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> CaptionedImage:
        before = self._picture(self.edits[index], "") if index in self.edits else None
        return self._picture(self.names[index], self.captions[index], before)

    def _picture(self, name: str, caption: str, before: CaptionedImage | None = None) -> CaptionedImage:
        return CaptionedImage(caption, FileSlice(self.path / name), str(self.path / name), before)

    def _read_captions(self) -> list[_Entry]:
        file = self.path / "captions.jsonl"
        if not file.is_file():
            raise ValueError(
                f"{file} does not exist: expected a folder with images and a captions.jsonl, "
                'one {"image": "relative/path.jpg", "caption": "..."} per line'
            )
        entries = []
        for number, line in enumerate(file.read_bytes().splitlines(), start=1):
            if not line.strip():
                continue
            try:
                entries.append(self._parse(line, f"{file}:{number}"))
            except SampleError as error:
                self.skipped.append((error.name, error.reason))
                warn_skipped(self.path, error.name, error.reason)
        return entries

    def _parse(self, line: bytes, where: str) -> _Entry:
        try:
            entry: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SampleError(where, f"malformed JSON ({error})") from error
        fields = entry if isinstance(entry, dict) else {}
        name, caption, before = fields.get("image"), fields.get("caption"), fields.get("source_image")
        if not isinstance(name, str) or not isinstance(caption, str) or not caption.strip():
            raise SampleError(where, 'expected {"image": "relative/path.jpg", "caption": "non-empty text"}')
        if not (before is None or (isinstance(before, str) and before)):
            raise SampleError(where, f'"source_image" is {before!r}; expected "relative/path.jpg"')
        if not is_unicode(caption):
            raise SampleError(where, "the caption is no valid Unicode: half of a surrogate pair is in it")
        image, first = self._checked(name, where), self._checked(before, where) if before else ""
        return _Entry(image, caption.strip(), first)

    def _checked(self, name: str, where: str) -> str:
        # all captions of a file stay together: of "./a.png", "a.png" and its absolute path too
        here = os.path.abspath(self.path)
        inside = os.path.relpath(os.path.join(here, name), here)
        name = inside if not inside.startswith(os.pardir) else os.path.normpath(name)
        if not _is_file(self.path / name):
            raise SampleError(str(self.path / name), f"{where} names an image that does not exist")
        upright_size(FileSlice(self.path / name), str(self.path / name))
        return name


def open_rgb(file: Path, name: str) -> "Image.Image":
    """The image in `file`, as `CaptionedImage.image` gives it."""
    return CaptionedImage("", FileSlice(file), name).image


def decode_rgb(content: bytes, name: str) -> "Image.Image":
    """The image, upright, and on white where it is transparent; any failure of a decoder is a `SampleError`."""
    with decoding(name), require("PIL.Image").open(io.BytesIO(content)) as image:
        return upright_rgb(image)


def upright_rgb(image: "Image.Image") -> "Image.Image":
    """RGB, upright by its EXIF data, on white where it is transparent: how training and sampling see an image."""
    image_module = require("PIL.Image")
    upright: Image.Image = require("PIL.ImageOps").exif_transpose(image)
    if upright.mode == "F" or (upright.mode == "I" and image.format != "PPM"):
        raise ValueError(f"pixels of mode {upright.mode!r} have no range that is known: save them with 8 or 16 bits")
    if upright.mode.startswith("I"):  # levels up to 65535, which PIL would hold to 255
        deep = np.asarray(upright)
        levels = (deep // 257).astype(np.uint8)
        if isinstance(clear := upright.info.get("transparency"), int):
            levels[deep == clear] = 255
        return image_module.fromarray(levels).convert("RGB")
    if "A" not in upright.getbands() and "transparency" not in upright.info:
        return upright.convert("RGB")
    rgba = upright.convert("RGBA")
    white = image_module.new("RGBA", rgba.size, "white")
    return image_module.alpha_composite(white, rgba).convert("RGB")


def upright_size(content: "FileSlice | Image.Image", name: str) -> tuple[int, int]:
    """(width, height) as the picture is shown, from a file's header or an image in memory."""
    if not isinstance(content, FileSlice):
        return content.size
    with decoding(name), open(content.path, "rb") as file:
        file.seek(content.offset)
        header = file if content.size is None else io.BytesIO(file.read(content.size))
        behind = _is_told_behind(header)
        with require("PIL.Image").open(header) as image:
            # others would have to be decoded, to find EXIF behind the pixels
            says = image.format != "PNG" or behind or {"exif", "xmp", _XMP.decode()} & image.info.keys()
            turned = says and image.getexif().get(_ORIENTATION, 1) in _QUARTER_TURNS
            # some versions of Pillow give a TIFF's size already rotated
            size = (image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT]) if image.format == "TIFF" else image.size
            return size[::-1] if turned else size


def _is_told_behind(file: IO[bytes]) -> bool:
    """Whether a PNG has EXIF or XMP behind its pixels, as ImageMagick writes it; `file` stands where it stood."""
    begin, tail = file.tell(), b""
    if file.read(len(_PNG)) == _PNG:
        file.seek(max(begin, file.seek(0, os.SEEK_END) - _TAIL))
        tail = file.read()
    file.seek(begin)
    return b"eXIf" in tail or _XMP in tail


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Turns any failure of a decoder on the image `name` into a `SampleError`."""
    image_module = require("PIL.Image")
    try:
        yield
    except image_module.DecompressionBombError as error:
        raise SampleError(name, f"image too large ({error})") from error
    except MemoryError:
        raise
    except Exception as error:  # on bad bytes, Pillow's decoders raise almost anything
        raise SampleError(name, f"unreadable image ({error})") from error


class TextSource:
    """Named texts: `source[i]` is the text `source.names[i]`; about `test_fraction` of them are held out.

    keys: {name: the key that decides whether it is held out}, by default the name itself.
    """

    def __init__(
        self,
        texts: dict[str, str],
        split: Split,
        test_fraction: float,
        skipped: Iterable[Skipped] = (),
        keys: Mapping[str, str] | None = None,
    ):
        keys = {name: name for name in texts} if keys is None else keys
        test_keys = held_out(keys.values(), test_fraction)
        self.names = [name for name in sorted(texts) if in_split(keys[name], split, test_keys)]
        if not self.names:
            raise EmptySplitError(f"the {split} split is empty: {len(texts)} text(s) in all")
        self.skipped = list(skipped)
        self._texts = [texts[name] for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> str:
        return self._texts[index]
