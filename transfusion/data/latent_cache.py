"""The output of an autoencoder's encoder for each image, kept on disk, so that training encodes nothing twice.

    DIR/<fingerprint of the encoder>/latents-00000.safetensors, ...      one tensor per image, with its checksum

The key of an entry is the sha256 of the image's content and the size it was cropped to: an image that changes, or
another autoencoder, never finds the latents of the old one. Moments (mean and log variance) are kept in the dtype the
encoder computes in, unscaled, so that a read gives bit for bit what encoding that image alone gives.
"""

import json
import logging
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transfusion.data.autoencoder import DiffusersAutoencoder
from transfusion.data.sources import CaptionedImage, SampleError, Skipped
from transfusion.data.transforms import Size, nearest_size, to_tensor

logger = logging.getLogger(__name__)

_CHECKSUMS = "crc32"


def entry_key(content_key: str, size: Size) -> str:
    """The entry of an image with this content key, cropped to (height, width)."""
    return f"{content_key}-{size[0]}x{size[1]}"


class LatentCache:
    """The moments of one encoder's images: `key in cache`, `cache.read(key)`, `cache.write(entries)`.

    Raises `ValueError` naming a shard that cannot be read; with `repair` such shards are warned about and deleted,
    and every entry's checksum is verified first. Shards are memory-mapped: what is not read takes no memory.
    """

    def __init__(self, folder: str | Path, fingerprint: str, repair: bool = False) -> None:
        self.folder = Path(folder) / fingerprint[:16]
        self._files: dict[str, Path] = {}
        self._open: dict[Path, tuple[Any, dict[str, int]]] = {}
        for leftover in self.folder.glob("*.tmp") if repair else ():  # left by a process that was killed while writing
            leftover.unlink()
        for path in sorted(self.folder.glob("latents-*.safetensors")):
            try:
                self._add(path)
                for key in self._open[path][1] if repair else ():
                    self.read(key)
            except ValueError as error:
                if not repair:
                    raise
                logger.warning("%s; deleted, its images are encoded again", error)
                self._forget(path)
                path.unlink()

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def read(self, key: str) -> Tensor:
        """-> moments (2C, h, w). Raises `KeyError` where there are none, `ValueError` where they are damaged."""
        path = self._files[key]
        shard, checksums = self._open[path]
        moments: Tensor = shard.get_tensor(key)
        if _checksum(moments) != checksums[key]:
            raise ValueError(_damaged(path, f"wrong checksum of {key}"))
        return moments

    def write(self, entries: dict[str, Tensor]) -> Path:
        """Adds a shard with `entries`, written under another name and then renamed. Raises `OSError` naming it."""
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        last = max((int(path.stem.split("-")[1]) for path in self.folder.glob("latents-*.safetensors")), default=-1)
        path = self.folder / f"latents-{last + 1:05d}.safetensors"
        aside = path.with_suffix(".tmp")
        checksums = {key: _checksum(moments) for key, moments in entries.items()}
        try:
            save_file({k: v.contiguous() for k, v in entries.items()}, aside, {_CHECKSUMS: json.dumps(checksums)})
            with open(aside, "rb") as file:
                os.fsync(file.fileno())
            os.replace(aside, path)
        except Exception as error:  # safetensors has an exception of its own for a full disk
            aside.unlink(missing_ok=True)
            raise OSError(f"cannot write {path}: {error}; the shards before it are whole") from error
        self._add(path)
        return path

    def _add(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            shard = safe_open(path, "pt").__enter__()
            checksums = json.loads((shard.metadata() or {})[_CHECKSUMS])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ValueError(_damaged(path, str(error))) from error
        self._open[path] = shard, checksums
        self._files |= dict.fromkeys(checksums, path)

    def _forget(self, path: Path) -> None:
        self._open.pop(path, None)
        self._files = {key: file for key, file in self._files.items() if file != path}


def _checksum(moments: Tensor) -> int:
    return zlib.crc32(moments.contiguous().view(torch.uint8).numpy().tobytes())


def _damaged(path: Path, why: str) -> str:
    return f"{path} is damaged ({why}); `transfusion encode` rebuilds it"


def encode_images(
    samples: Iterable[CaptionedImage | SampleError],
    sizes: list[Size],
    autoencoder: DiffusersAutoencoder,
    cache: LatentCache,
    shard_entries: int = 1024,
    device: torch.device | str = "cpu",
) -> tuple[int, list[Skipped]]:
    """Writes the moments of every sample that `cache` lacks. -> how many were encoded, and what cannot be read.

    Each image is encoded by itself, as in the loader. `shard_entries` moments, or one more, are in memory; if this is
    stopped, what was written stays, and the next call continues from there.
    """
    pending: dict[str, Tensor] = {}
    skipped: list[Skipped] = []
    count = 0
    for sample in samples:
        try:
            if isinstance(sample, SampleError):
                raise sample
            size = nearest_size(*sample.size, sizes) if len(sizes) > 1 else sizes[0]
            keyed = {entry_key(picture.key, size): picture for picture in sample.pictures}
            missing = {key: picture for key, picture in keyed.items() if key not in cache and key not in pending}
            decoded = {key: to_tensor(picture.image, size) for key, picture in missing.items()}
        except SampleError as error:
            skipped.append((error.name, error.reason))
            logger.warning("skipped %s", error)
            continue
        for key, pixels in decoded.items():
            pending[key] = autoencoder.moments(pixels[None].to(device))[0].cpu()
            count += 1
        if len(pending) >= shard_entries:
            cache.write(pending)
            pending = {}
    if pending:
        cache.write(pending)
    return count, skipped
