"""A stream is read in order, shard by shard: for samples too many to list, or that come in archives.

    stream.read(shard, start) -> (cursor, sample), ...     `start` 0, or any cursor that came with a sample

A cursor is an integer that says where the next sample begins, so that a reader can resume there without reading what
came before. Image streams give `CaptionedImage`, text streams `str`. A hash of each name decides which samples are held
out.
"""

import hashlib
import json
import logging
import re
import tarfile
from collections.abc import Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeVar, runtime_checkable

from transfusion.data.sources import CaptionedImage, FileSlice, SampleError, Skipped, Split, is_unicode
from transfusion.data.texts import parse_text

logger = logging.getLogger(__name__)

T_co = TypeVar("T_co", covariant=True)
_IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"})
_BEFORE = "source."  # the image before an edit
_BEFORE_SUFFIXES = frozenset(_BEFORE + suffix for suffix in _IMAGE_SUFFIXES)
_CAPTION_SUFFIXES = ("txt", "caption", "json")


@runtime_checkable
class Stream(Protocol[T_co]):
    """Samples in `num_shards` shards; what could not be read is kept by name and reason in `skipped`."""

    num_shards: int
    skipped: list[Skipped]
    identity: int  # a hash that identifies its shards: a cursor into one of them means nothing in another

    def read(self, shard: int, start: int = 0) -> Iterator[tuple[int, T_co]]:
        """The samples of one shard from the cursor `start` on, each with the cursor after it."""


class SkipLog:
    """Names each sample that a stream skips, once."""

    def __init__(self) -> None:
        self.skipped: list[Skipped] = []
        self._known: set[str] = set()

    def skip(self, name: str, reason: str) -> None:
        """Warns about `name`, unless it has already done so."""
        if name not in self._known:
            self._known.add(name)
            self.skipped.append((name, reason))
            logger.warning("skipped %s: %s", name, reason)


def identity_of(*words: str) -> int:
    """A hash of 48 bits."""
    return int.from_bytes(hashlib.sha256(repr(words).encode(errors="surrogatepass")).digest()[:6], "big")


def identity_of_files(paths: Sequence[Path]) -> int:
    """Of names, order and sizes, wherever the files lie."""
    return identity_of(*(f"{path.name} {path.stat().st_size}" for path in paths))


def belongs(name: str, split: Split, test_fraction: float) -> bool:
    """Whether the sample `name` is in `split`: held out where sha256(name) / 2^256 < test_fraction."""
    if split not in ("train", "test", "all"):
        raise ValueError(f"split must be 'train', 'test' or 'all', got {split!r}")
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).digest()  # a member's name may not be Unicode
    return split == "all" or (int.from_bytes(digest[:8], "big") < test_fraction * 2**64) == (split == "test")


def shard_paths(pattern: str) -> list[Path]:
    """The files that `pattern` names, sorted: a path, `*` and `?`, a range {000..120} or a choice {a,b}.

    Raises `ValueError` if a file is missing, or nothing matches.
    """
    if Path(pattern).is_file():  # whatever its name holds
        return [Path(pattern)]
    choice = re.search(r"\{([^{}]*)\}", pattern)
    if choice:
        bounds = re.fullmatch(r"(\d+)\.\.(\d+)", choice[1])
        options = choice[1].split(",")
        if bounds and int(bounds[1]) > int(bounds[2]):
            raise ValueError(f"the range {choice[0]} of {pattern} goes down; give {{{bounds[2]}..{bounds[1]}}}")
        if bounds:
            options = [f"{n:0{len(bounds[1])}d}" for n in range(int(bounds[1]), int(bounds[2]) + 1)]
        parts = (pattern[: choice.start()] + option + pattern[choice.end() :] for option in options)
        return [path for part in parts for path in shard_paths(part)]
    found = sorted(Path(match) for match in glob(pattern)) if has_magic(pattern) else [Path(pattern)]
    missing = [path for path in found if not path.is_file()]
    if not found or missing:
        raise ValueError(f"no shard at {missing[0] if missing else pattern}")
    return found


class TarImages(SkipLog):
    """Captioned images in tar shards laid out as WebDataset's: members that share a name up to its first dot.

    An image (.jpg, .png, .webp, ...) beside a .txt or .caption, or a .json with a "caption"; for an edit also its
    source image (.source.jpg, ...). Only headers and captions are read here; an image's bytes are read where they lie
    in the archive when they are asked for. A truncated shard yields the samples before the damage. Archives must be
    uncompressed, so that a reader can start in the middle.
    """

    def __init__(self, paths: Sequence[Path], split: Split = "train", test_fraction: float = 0.05) -> None:
        super().__init__()
        compressed = [path for path in paths if path.suffix != ".tar"]
        if compressed:
            raise ValueError(
                f"{compressed[0]} is no plain .tar; a shard must be uncompressed to be read from its middle"
            )
        self.paths, self.num_shards, self.identity = list(paths), len(paths), identity_of_files(paths)
        self._split: Split = split
        self._test_fraction = test_fraction

    def read(self, shard: int, start: int = 0) -> Iterator[tuple[int, CaptionedImage]]:
        """Complete samples from the byte `start` on, where a member's header must be."""
        path = self.paths[shard]
        for cursor, key, members in self._groups(path, start):
            try:
                sample = _captioned(path, key, members)
            except SampleError as error:
                self.skip(error.name, error.reason)
                continue
            if belongs(f"{path.name}/{key}", self._split, self._test_fraction):  # wherever the shards are moved
                yield cursor, sample

    def _groups(self, path: Path, start: int) -> Iterator[tuple[int, str, dict[str, FileSlice]]]:
        """(offset after it, key, {suffix: bytes}) of each sample."""
        key, members = "", dict[str, FileSlice]()
        try:
            with open(path, "rb") as file:
                file.seek(start)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    while (member := tar.next()) is not None:
                        tar.members = []  # type: ignore[attr-defined]  # else it keeps every header of a shard
                        if not member.isfile():
                            continue
                        stem, _, suffix = PurePosixPath(member.name).name.partition(".")
                        if (
                            not stem or not suffix
                        ):  # of no sample: "._a.png" beside "a.png", as macOS packs it, a README
                            continue
                        found = str(PurePosixPath(member.name).parent / stem)
                        if members and found != key:
                            yield member.offset, key, members
                            members = {}
                        key = found
                        members[suffix.lower()] = FileSlice(path, member.offset_data, member.size)
                    end = tar.offset
                file.seek(end)
                if any(file.read(tarfile.BLOCKSIZE)):  # tarfile takes an unreadable header for the end
                    raise tarfile.ReadError(f"no header at byte {end}")
            if members:
                yield end, key, members
        except (OSError, tarfile.TarError) as error:
            self.skip(str(path), f"the shard is damaged at {key or 'its beginning'} ({error})")


def _captioned(path: Path, key: str, members: dict[str, FileSlice]) -> CaptionedImage:
    name = f"{path}/{key}"
    image, before = (
        next((content for suffix, content in members.items() if suffix in kinds), None)
        for kinds in (_IMAGE_SUFFIXES, _BEFORE_SUFFIXES)
    )
    if image is None:
        raise SampleError(name, f"no image among its members ({', '.join(sorted(members))})")
    try:
        caption = _caption({suffix: members[suffix].read() for suffix in _CAPTION_SUFFIXES if suffix in members})
    except (OSError, ValueError, RecursionError) as error:
        raise SampleError(name, f"unreadable caption ({error})") from error
    if not is_unicode(caption):
        raise SampleError(name, "the caption is no valid Unicode: half of a surrogate pair is in it")
    if not caption.strip():
        raise SampleError(name, 'no caption: expected a .txt, or a .json with {"caption": "..."}')
    first = CaptionedImage("", before, f"{name}.{_BEFORE[:-1]}") if before else None
    return CaptionedImage(caption.strip(), image, name, first)


def _caption(texts: dict[str, bytes]) -> str:
    for suffix in ("txt", "caption"):
        if suffix in texts:
            return texts[suffix].decode("utf-8-sig")
    entry = json.loads(texts["json"]) if "json" in texts else None
    caption = entry.get("caption") if isinstance(entry, dict) else None
    return caption if isinstance(caption, str) else ""


class JsonlTexts(SkipLog):
    """Texts of .jsonl files, one {"text": "..."} a line; a file is a shard, a cursor the offset of a line.

    A hash of the text decides whether it is held out, so a duplicate is on the same side.
    """

    def __init__(self, paths: Sequence[Path], split: Split = "train", test_fraction: float = 0.01) -> None:
        super().__init__()
        self.paths, self.num_shards, self.identity = list(paths), len(paths), identity_of_files(paths)
        self._split: Split = split
        self._test_fraction = test_fraction

    def read(self, shard: int, start: int = 0) -> Iterator[tuple[int, str]]:
        """The texts from the byte `start` on, where a line must begin."""
        path, cursor = self.paths[shard], start
        with open(path, "rb") as file:
            file.seek(start)
            for line in file:
                begins, cursor = cursor, cursor + len(line)
                if not line.strip():
                    continue
                text = parse_text(line, f"{path}@{begins}")
                if isinstance(text, SampleError):
                    self.skip(text.name, text.reason)
                elif belongs(text, self._split, self._test_fraction):
                    yield cursor, text
