"""Hugging Face `datasets`, from the hub or from disk: images with captions, and texts; whole, or as a stream.

    hf:NAME?split=train&image=image&caption=text&config=...      NAME: a hub name, or a folder
    hf:NAME?image=edited&source_image=original&caption=prompt    edits: images that a caption tells how to change

A column that is not named is found: the first image column, and "caption" or "text". `datasets` is imported at use.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from transfusion.data.sources import (
    CaptionedImage,
    EmptySplitError,
    FileSlice,
    SampleError,
    Skipped,
    Split,
    TextSource,
    held_out,
    in_split,
    is_unicode,
)
from transfusion.data.streams import SkipLog, belongs, identity_of
from transfusion.optional import require

_OPTIONS = ("split", "image", "source_image", "caption", "text", "config")


class HubColumns:
    """The dataset that a specification names, and its columns, with images left undecoded."""

    def __init__(self, spec: str, streaming: bool, wants_images: bool) -> None:
        self.name, _, query = spec.partition("?")
        options = dict(parse_qsl(query, strict_parsing=True)) if query else {}
        unknown = sorted(options.keys() - _OPTIONS)
        if unknown:
            raise ValueError(f"{spec!r}: unknown option {unknown[0]!r}; known: {', '.join(_OPTIONS)}")
        self.data = _load(self.name, options, streaming)
        columns = list(self.data.column_names or next(iter(self.data.take(1)), ()))  # a stream may not know its columns
        self.image, self.before = "", options.get("source_image", "")
        if self.before and not wants_images:
            raise ValueError(f"{spec!r}: source_image is of images, and these are texts")
        if wants_images:
            features = self.data.features or {}
            pictures = [name for name in columns if type(features.get(name)).__name__ == "Image"]
            found = [name for name in pictures if name != self.before]
            self.image = _chosen(spec, options.get("image"), found, columns, "image")
            both = [self.image, *([_chosen(spec, self.before, [], columns, "source_image")] if self.before else [])]
            for name in both:
                self.data = self.data.cast_column(name, require("datasets").Image(decode=False))
        wanted = options.get("caption") or options.get("text")
        found = [name for name in ("caption", "captions", "text") if name in columns]
        self.text = _chosen(spec, wanted, found, columns, "caption" if wants_images else "text")
        self.data = self.data.select_columns([name for name in (self.image, self.before, self.text) if name])

    def captioned(self, row: dict[str, Any], name: str) -> CaptionedImage:
        """The sample of one row. Raises `SampleError` where image or caption is missing."""
        caption = first_text(row[self.text])
        if not caption:
            raise SampleError(name, f"column {self.text!r} holds no caption")
        before = _picture(row, self.before, name) if self.before else None
        return replace(_picture(row, self.image, name), caption=caption, before=before)


def _picture(row: dict[str, Any], column: str, name: str) -> CaptionedImage:
    content = row[column] or {}
    if content.get("bytes"):
        return CaptionedImage("", content["bytes"], name)
    if content.get("path"):
        return CaptionedImage("", FileSlice(Path(content["path"])), name)
    raise SampleError(name, f"column {column!r} holds no image")


def first_text(value: Any) -> str:
    """A text, or the first of several; "" where there is none."""
    if isinstance(value, list):
        value = value[0] if value else ""
    return value.strip() if isinstance(value, str) and is_unicode(value) else ""


def _chosen(spec: str, wanted: str | None, found: list[str], columns: list[str], kind: str) -> str:
    if wanted and wanted not in columns:
        raise ValueError(f"{spec!r}: no column {wanted!r}; the columns are {', '.join(columns)}")
    if not (wanted or found):
        raise ValueError(f"{spec!r}: no {kind} column found in {', '.join(columns)}; name it with ?{kind}=COLUMN")
    return wanted or found[0]


def _load(name: str, options: dict[str, str], streaming: bool) -> Any:
    datasets = require("datasets", "hub")
    saved = Path(name)
    if (saved / "state.json").is_file() or (saved / "dataset_dict.json").is_file():
        data = datasets.load_from_disk(name)
        if (saved / "dataset_dict.json").is_file():
            data = data[options.get("split", "train")]
        return data.to_iterable_dataset() if streaming else data
    split = options.get("split", "train")
    return datasets.load_dataset(name, options.get("config"), split=split, streaming=streaming)


class HubImages:
    """A map-style dataset of captioned images; `test_fraction` of the rows are held out, by a hash of their number."""

    def __init__(self, spec: str, split: Split = "train", test_fraction: float = 0.05) -> None:
        self._columns = HubColumns(spec, streaming=False, wants_images=True)
        self.skipped: list[Skipped] = []
        self.names, self.captions, self._rows = list[str](), list[str](), list[int]()
        captions = self._columns.data[self._columns.text]
        test_names = held_out((self._name(row) for row in range(len(captions))), test_fraction)
        for row, value in enumerate(captions):
            caption = first_text(value)
            if not caption:
                self.skipped.append((self._name(row), f"column {self._columns.text!r} holds no caption"))
            elif in_split(self._name(row), split, test_names):
                self.names.append(self._name(row))
                self.captions.append(caption)
                self._rows.append(row)
        if not self.names:
            raise EmptySplitError(
                f"the {split} split of {spec!r} is empty: {len(captions)} row(s), {len(self.skipped)} skipped"
            )
        self.edits = dict.fromkeys(range(len(self.names)), self._columns.before) if self._columns.before else {}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> CaptionedImage:
        return self._columns.captioned(self._columns.data[self._rows[index]], self.names[index])

    def _name(self, row: int) -> str:
        return f"{self._columns.name}[{row}]"


class HubTexts(TextSource):
    """The texts of a map-style dataset, in memory; about `test_fraction` of the rows are held out."""

    def __init__(self, spec: str, split: Split = "train", test_fraction: float = 0.1) -> None:
        columns = HubColumns(spec, streaming=False, wants_images=False)
        texts = {f"{columns.name}[{row}]": first_text(text) for row, text in enumerate(columns.data[columns.text])}
        blank = [(name, "blank") for name, text in texts.items() if not text]
        super().__init__({name: text for name, text in texts.items() if text}, split, test_fraction, blank)


class HubStream(SkipLog):
    """A streamed dataset: its own shards, and rows counted in each shard; every rank reads the whole stream.

    `read` gives what `_sample` makes of a row. A cursor is a number of rows, which the reader skips.
    """

    def __init__(self, spec: str, split: Split, test_fraction: float, wants_images: bool) -> None:
        super().__init__()
        self._columns = HubColumns(spec, streaming=True, wants_images=wants_images)
        self._split: Split = split
        self._test_fraction = test_fraction
        self.num_shards = int(self._columns.data.num_shards)
        self.identity = identity_of(self._columns.name, str(self.num_shards))

    def _rows(self, shard: int, start: int) -> Iterator[tuple[int, str, dict[str, Any]]]:
        rows = self._columns.data.shard(self.num_shards, shard)
        for number, row in enumerate(rows.skip(start) if start else rows, start=start):
            name = f"{self._columns.name}[{shard}:{number}]"
            if belongs(name, self._split, self._test_fraction):
                yield number + 1, name, row


class HubImageStream(HubStream):
    """Captioned images of a streamed dataset."""

    def __init__(self, spec: str, split: Split = "train", test_fraction: float = 0.05) -> None:
        super().__init__(spec, split, test_fraction, wants_images=True)

    def read(self, shard: int, start: int = 0) -> Iterator[tuple[int, CaptionedImage]]:
        """The samples of one shard, from row `start` on."""
        for after, name, row in self._rows(shard, start):
            try:
                yield after, self._columns.captioned(row, name)
            except SampleError as error:
                self.skip(error.name, error.reason)


class HubTextStream(HubStream):
    """Texts of a streamed dataset."""

    def __init__(self, spec: str, split: Split = "train", test_fraction: float = 0.01) -> None:
        super().__init__(spec, split, test_fraction, wants_images=False)

    def read(self, shard: int, start: int = 0) -> Iterator[tuple[int, str]]:
        """The texts of one shard, from row `start` on."""
        for after, name, row in self._rows(shard, start):
            text = first_text(row[self._columns.text])
            if text:
                yield after, text
            else:
                self.skip(name, "blank")
