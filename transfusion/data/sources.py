"""A source is a map-style sequence: `len(source)`, `source[i]`, and what it had to skip, by name and reason.

    image source   source[i] -> CaptionedImage     FolderSource, EmojiSource (emoji.py)
    text source    source[i] -> str                PydocTextSource, TextFolderSource

Train and test are told apart by a hash of each sample's name, so that a sample stays where it is when others
come or go, on every machine.
"""

import hashlib
import json
import logging
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from transfusion.data.optional import require

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

Split = Literal["train", "test", "all"]
Skipped = tuple[str, str]


class SampleError(ValueError):
    """One sample cannot be read. The loader skips it, counts it and names it; the run goes on."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


@dataclass(frozen=True)
class CaptionedImage:
    """One sample: a caption, an RGB image of any size, and the name that messages use for it."""

    caption: str
    image: "Image.Image"
    name: str


class ImageSource(Protocol):
    """Captioned images. `names` and `captions` are known without decoding an image; `source[i]` may `SampleError`."""

    names: list[str]
    captions: list[str]
    skipped: list[Skipped]

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> CaptionedImage:
        """Sample `index`, its image decoded."""


def held_out(keys: Iterable[str], fraction: float) -> set[str]:
    """{key : sha256(key) / 2^256 < fraction}, or the key of the smallest hash where that would be empty.

    At least one of two or more keys is held out, so that a small set has a test split too.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the held-out fraction must be in [0, 1), got {fraction}")
    hashes = {key: hashlib.sha256(key.encode()).digest() for key in keys}
    chosen = {key for key, digest in hashes.items() if int.from_bytes(digest[:8], "big") < fraction * 2**64}
    if not chosen and fraction > 0 and len(hashes) > 1:
        chosen = {min(hashes, key=lambda key: hashes[key])}
    return chosen


def in_split(key: str, split: Split, test_keys: set[str]) -> bool:
    """Whether `key` belongs to `split`, where `test_keys` are held out."""
    if split not in ("train", "test", "all"):
        raise ValueError(f"split must be 'train', 'test' or 'all', got {split!r}")
    return split == "all" or (key in test_keys) == (split == "test")


class FolderSource:
    """Captioned images of a folder: each line of `captions.jsonl` is {"image": "a/b.jpg", "caption": "..."}.

    An entry that is malformed, or whose image is missing or is no image by its header, is skipped: warned about,
    and kept with its reason in `skipped`. Pixels are decoded at access; a file that turns out to be corrupt then
    raises `SampleError`. `test_fraction` of the image files are held out; all captions of a file stay together.
    Raises `ValueError` where there is no captions file, or where nothing valid is left.
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
        test_names = held_out((name for name, _ in entries), test_fraction)
        chosen = [entry for entry in entries if in_split(entry[0], split, test_names)]
        if not chosen:
            raise ValueError(f"the {split} split of {self.path} is empty: {len(entries)} captioned image(s) in all")
        self.names = [name for name, _ in chosen]
        self.captions = [caption for _, caption in chosen]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> CaptionedImage:
        name = self.names[index]
        return CaptionedImage(self.captions[index], open_rgb(self.path / name, name), name)

    def _read_captions(self) -> list[tuple[str, str]]:
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
                entries.append(self._parse(line, f"captions.jsonl:{number}"))
            except SampleError as error:
                self.skipped.append((error.name, error.reason))
                logger.warning("%s: skipped %s", self.path, error)
        return entries

    def _parse(self, line: bytes, where: str) -> tuple[str, str]:
        try:
            entry: Any = json.loads(line)
        except ValueError as error:
            raise SampleError(where, f"malformed JSON ({error})") from error
        name, caption = (entry.get("image"), entry.get("caption")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(caption, str) or not caption.strip():
            raise SampleError(where, 'expected {"image": "relative/path.jpg", "caption": "non-empty text"}')
        if not (self.path / name).is_file():
            raise SampleError(name, f"{where} names an image that does not exist")
        open_rgb(self.path / name, name, header_only=True)
        return name, caption.strip()


def open_rgb(file: Path, name: str, header_only: bool = False) -> "Image.Image":
    """The image upright and on white where it is transparent; any way in which a decoder fails is a `SampleError`."""
    image_module, image_ops = require("PIL.Image"), require("PIL.ImageOps")
    try:
        with image_module.open(file) as image:
            if header_only:
                return image
            upright = image_ops.exif_transpose(image)
            if "A" not in upright.getbands() and "transparency" not in upright.info:
                return upright.convert("RGB")
            rgba = upright.convert("RGBA")
            return image_module.alpha_composite(image_module.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    # what Pillow's decoders raise on bad bytes, beyond OSError
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error) as error:
        raise SampleError(name, f"unreadable image ({error})") from error
    except image_module.DecompressionBombError as error:
        raise SampleError(name, f"image too large ({error})") from error


class TextSource:
    """Named texts: `source[i]` is the text `source.names[i]`; about `test_fraction` of the names are held out."""

    def __init__(self, texts: dict[str, str], split: Split, test_fraction: float, skipped: Iterable[Skipped] = ()):
        test_names = held_out(texts, test_fraction)
        self.names = [name for name in sorted(texts) if in_split(name, split, test_names)]
        if not self.names:
            raise ValueError(f"the {split} split is empty: {len(texts)} text(s) in all")
        self.skipped = list(skipped)
        self._texts = [texts[name] for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> str:
        return self._texts[index]


class PydocTextSource(TextSource):
    """The language reference that ships with CPython (`pydoc_data.topics`), one document per topic.

    Topics quote each other at length (a quarter of the text), so a paragraph is kept once, in a held-out topic
    first: no paragraph of the test split occurs in the train split.
    """

    def __init__(self, split: Split = "train", test_fraction: float = 0.1) -> None:
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise ImportError(f"this Python has no pydoc_data ({error}): use TextFolderSource") from error
        super().__init__(_paragraphs_once(topics, held_out(topics, test_fraction)), split, test_fraction)


def _paragraphs_once(topics: dict[str, str], first: set[str]) -> dict[str, str]:
    seen: set[str] = set()
    unique = {}
    for name in sorted(topics, key=lambda name: (name not in first, name)):
        kept = []
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if words not in seen:
                kept.append(paragraph)
            if len(words) >= 40:  # short ones, such as "See also:", may come again
                seen.add(words)
        if kept:
            unique[name] = "\n\n".join(kept)
    return unique


class TextFolderSource(TextSource):
    """Every *.txt file under a folder, one UTF-8 document per file, named by its path in the folder.

    Files that are blank or cannot be read are warned about and kept with their reason in `skipped`. Raises
    `ValueError` where no text is left.
    """

    def __init__(self, path: str | Path, split: Split = "train", test_fraction: float = 0.1) -> None:
        folder = Path(path)
        texts, skipped = {}, []
        for file in sorted(folder.rglob("*.txt")):
            name = file.relative_to(folder).as_posix()
            try:
                text = file.read_text(encoding="utf-8")
                reason = "" if text.strip() else "the file is blank"
            except (OSError, UnicodeDecodeError) as error:
                text, reason = "", f"unreadable text ({error})"
            if reason:
                skipped.append((name, reason))
                logger.warning("%s: skipped %s: %s", folder, name, reason)
            else:
                texts[name] = text
        if not texts:
            raise ValueError(f"{folder} has no readable text: expected UTF-8 *.txt files ({len(skipped)} skipped)")
        super().__init__(texts, split, test_fraction, skipped)
