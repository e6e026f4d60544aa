"""Which samples a run reads: `DataConfig`, and the sources that its words name."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any, TypeVar

import torch

from transfusion.data.autoencoder import Autoencoder, DiffusersAutoencoder, PixelAutoencoder
from transfusion.data.drafting import Images, Mixture, Texts
from transfusion.data.emoji import EmojiSource
from transfusion.data.hub import HubImages, HubImageStream, HubTexts, HubTextStream
from transfusion.data.latent_cache import LatentCache
from transfusion.data.listing import JoinedImages, each_image, in_order, listed_images
from transfusion.data.loader import Loader, LoaderConfig
from transfusion.data.sources import (
    CaptionedImage,
    EmptySplitError,
    FolderSource,
    ImageSource,
    SampleError,
    Split,
    TextSource,
)
from transfusion.data.streams import JsonlTexts, Stream, TarImages, shard_paths
from transfusion.data.texts import PydocTextSource, TextFolderSource
from transfusion.data.tokenizer import Tokenizer

T = TypeVar("T")

_STREAM, _EMOJI, _HUB, _NONE, _PYDOC, _PIXELS = "stream:", "emoji:", "hf:", "none", "pydoc", "pixels"


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from, and how they become batches.

    Args:
        images: "emoji:demo", "emoji:animals-and-food", "emoji:all", a folder with captions.jsonl, tar shards such as
            "shards/{000..120}.tar", "hf:NAME" of Hugging Face datasets ("stream:hf:NAME" reads it in order), or "none";
            several make a mixture.
        texts: "pydoc" (Python's own reference manual), a folder of .txt and .jsonl files, one such file,
            "stream:texts/*.jsonl", "hf:NAME" ("stream:hf:NAME"), or "none"; several make a mixture.
        autoencoder: "pixels" (latents are pixels in [-1, 1]) or a diffusers AutoencoderKL, local folder or hub name.
        loader: how samples become batches.
        image_weights: the share of each of `images`; none is equal shares.
        text_weights: the share of each of `texts`; none is equal shares.
        latent_cache: folder of latents that `transfusion encode` wrote; "" encodes images each time.
    """

    images: str | tuple[str, ...] = "none"
    texts: str | tuple[str, ...] = "none"
    autoencoder: str = "pixels"
    loader: LoaderConfig = field(
        default_factory=lambda: LoaderConfig(rows=20, row_length=108, image_size=32, patch_size=8)
    )
    image_weights: tuple[float, ...] = ()
    text_weights: tuple[float, ...] = ()
    latent_cache: str = ""

    def __post_init__(self) -> None:
        for kind, weights in (("image", self.image_weights), ("text", self.text_weights)):
            named = specs(getattr(self, f"{kind}s"))
            if weights and (len(weights) != len(named) or not all(0 < weight < inf for weight in weights)):
                raise ValueError(
                    f"{kind}_weights {weights} must be one positive and finite number for each of {kind}s {named}"
                )


def specs(value: str | Sequence[str]) -> tuple[str, ...]:
    """The words of `DataConfig.images` or `texts`, one by one; none for "none"."""
    return tuple(spec for spec in ([value] if isinstance(value, str) else value) if spec not in ("", _NONE))


def absolute(data: DataConfig) -> DataConfig:
    """The same config with absolute paths, so that it means the same from any directory."""

    def place(spec: str) -> str:
        where = spec.removeprefix(_STREAM)
        if where in ("", _NONE, _PYDOC, _PIXELS) or where.startswith((_EMOJI, _HUB)):
            return spec
        return spec.removesuffix(where) + str(Path(where).absolute())

    def places(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return place(value) if isinstance(value, str) else tuple(map(place, value))

    return replace(
        data,
        images=places(data.images),
        texts=places(data.texts),
        autoencoder=place(data.autoencoder) if Path(data.autoencoder).exists() else data.autoencoder,
        latent_cache=place(data.latent_cache),
    )


def open_images(spec: str, split: Split, image_size: int) -> Images:
    """The source or stream that one word of `DataConfig.images` names. Raises `ValueError` where there is none."""
    if spec.startswith(_EMOJI):
        return EmojiSource(image_size, split, spec.removeprefix(_EMOJI))  # type: ignore[arg-type]
    where = spec.removeprefix(_STREAM)
    if where.startswith(_HUB):
        return (HubImages if where == spec else HubImageStream)(where.removeprefix(_HUB), split)
    if where.endswith(".tar"):
        return TarImages(shard_paths(where), split)
    if where != spec or where.endswith((".tar.gz", ".tgz")):
        raise ValueError(f"{spec!r} cannot be streamed: name .tar files (uncompressed), or stream:hf:NAME")
    return FolderSource(Path(where), split)


def open_texts(spec: str, split: Split) -> Texts:
    """The source or stream that one word of `DataConfig.texts` names. Raises `ValueError` where there is none."""
    if spec == _PYDOC:
        return PydocTextSource(split)
    where = spec.removeprefix(_STREAM)
    if where.startswith(_HUB):
        return (HubTexts if where == spec else HubTextStream)(where.removeprefix(_HUB), split)
    return TextFolderSource(Path(where), split) if where == spec else JsonlTexts(shard_paths(where), split)


def make_autoencoder(data: DataConfig, device: torch.device | str = "cpu") -> Autoencoder:
    """Pixels to latents and back, as `data.autoencoder` says."""
    return PixelAutoencoder() if data.autoencoder == _PIXELS else DiffusersAutoencoder(data.autoencoder, device)


def check_sources(data: DataConfig) -> None:
    """Raises `ValueError` where `data` names neither images nor texts."""
    if not specs(data.images) and not specs(data.texts):
        raise ValueError(
            "nothing to train on: give --data.images, --data.texts or both, or a recipe that has them, such as "
            "--config demo"
        )


def make_loader(
    data: DataConfig, tokenizer: Tokenizer, autoencoder: Autoencoder, rank: int = 0, world_size: int = 1
) -> Loader:
    """The training batches of this rank. Raises `ValueError` naming what is missing.

    `loader.text_fraction` counts where there are images and texts; with images alone it is 0, with texts alone 1.
    """
    check_sources(data)
    images = [open_images(spec, "train", data.loader.image_size) for spec in specs(data.images)]
    texts = [open_texts(spec, "train") for spec in specs(data.texts)]
    cache = open_cache(data, autoencoder) if data.latent_cache else None
    loader = data.loader if images and texts else replace(data.loader, text_fraction=float(not images))
    return Loader(
        loader,
        tokenizer,
        Mixture(tuple(images), data.image_weights or (1.0,) * len(images)) if images else None,
        Mixture(tuple(texts), data.text_weights or (1.0,) * len(texts)) if texts else None,
        autoencoder,
        rank,
        world_size,
        cache,
    )


def open_cache(data: DataConfig, autoencoder: Autoencoder, repair: bool = False) -> LatentCache:
    """The cache in `data.latent_cache`. Raises `ValueError` if it is damaged, or empty and not to be filled."""
    if not isinstance(autoencoder, DiffusersAutoencoder):
        given = f"latent_cache={data.latent_cache!r}, autoencoder={data.autoencoder!r}"
        raise ValueError(f"{given}: a cache keeps the latents of an AutoencoderKL; pixels need none")
    cache = LatentCache(data.latent_cache, autoencoder.fingerprint, repair)
    if not len(cache) and not repair:
        raise ValueError(f"{cache.folder} holds no latents of {data.autoencoder}: run `transfusion encode` first")
    return cache


def image_source(data: DataConfig, split: Split, limit: int = 4096) -> ImageSource | None:
    """The captioned images of `split` as one list; of each stream, the first `limit`.

    None if `images` names none, or if its streams hold none out. Raises `ValueError` where there should be some.
    """
    opened = [_opened(open_images, spec, split, data.loader.image_size) for spec in specs(data.images)]
    listed = [listed_images(source, limit) for source in opened if source is not None]
    filled = [source for source in listed if len(source)]
    if listed and not filled and split != "test":
        skipped = [": ".join(skip) for source in listed for skip in source.skipped]
        raise ValueError(f"no image in {data.images}; skipped: {'; '.join(skipped[:3]) or 'none'}")
    return JoinedImages(filled) if len(filled) > 1 else next(iter(filled), None)


def text_source(data: DataConfig, split: Split, limit: int = 4096) -> TextSource | None:
    """The texts of `split` as one list; of each stream, the first `limit`; None as for images."""
    opened = [(spec, _opened(open_texts, spec, split)) for spec in specs(data.texts)]
    named = [(spec, source) for spec, source in opened if source is not None]
    sources = [source for _, source in named]
    if len(sources) == 1 and isinstance(sources[0], TextSource):
        return sources[0]
    texts: dict[str, str] = {}
    for spec, source in named:
        drawn = (
            islice(in_order(source), limit) if isinstance(source, Stream) else (source[k] for k in range(len(source)))
        )
        texts |= {f"{spec} {number:08d}": text for number, text in enumerate(drawn)}
    return TextSource(texts, "all", 0.0) if texts or (sources and split != "test") else None


def _opened(opener: Callable[..., T], spec: str, split: Split, *options: Any) -> T | None:
    """The source, or None if it holds nothing out: a single text or image is kept for training."""
    try:
        return opener(spec, split, *options)
    except EmptySplitError:
        if split != "test":
            raise
        return None


def all_images(data: DataConfig, split: Split) -> Iterator[CaptionedImage | SampleError]:
    """Every captioned image of `split`, in order, each stream once; in place of an unreadable one, the reason."""
    for spec in specs(data.images):
        source = open_images(spec, split, data.loader.image_size)
        yield from in_order(source) if isinstance(source, Stream) else each_image(source)
