"""Drafts, which packing knows by their length, become latents: read, decoded, cropped, encoded; or found in a cache."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from transfusion.data.autoencoder import Autoencoder, DiffusersAutoencoder
from transfusion.data.latent_cache import LatentCache, entry_key
from transfusion.data.sources import CaptionedImage, FileSlice, ImageSource, SampleError
from transfusion.data.transforms import Size, crop, from_levels

Content = np.ndarray | Tensor
"""Pixels (height, width, 3) uint8, or moments (2C, h, w)."""
_THREADS = 4


@dataclass(frozen=True)
class Draft:
    """A captioned image before it is read: its identity, source first; caption (n,), size in pixels, and tokens in a
    row. The image before an edit is cropped to the same size."""

    key: tuple[str, str | int]
    caption: Tensor
    size: Size
    length: int
    open: Callable[[], CaptionedImage]


class MapDeck(Sequence[Draft]):
    """The drafts of a map-style source, made on demand."""

    def __init__(
        self, source: ImageSource, label: str, known: list[tuple[int, Tensor, Size]], lengths: list[int]
    ) -> None:
        self._source, self._label, self._known, self.lengths = source, label, known, lengths

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, place: int) -> Draft:  # type: ignore[override]  # never sliced
        index, caption, size = self._known[place]
        return Draft((self._label, index), caption, size, self.lengths[place], partial(self._source.__getitem__, index))


class ImageReader:
    """`read` decodes drafts side by side; `latent` is what the autoencoder makes of one of them.

    workers: decoding processes; 0 is threads, which is enough where the decoder releases the interpreter lock. The
    result does not depend on it. cache: where it has the moments, pixels are not decoded at all.
    """

    def __init__(self, autoencoder: Autoencoder, cache: LatentCache | None, workers: int, sample: bool) -> None:
        if cache is not None and not isinstance(autoencoder, DiffusersAutoencoder):
            raise ValueError("a latent cache is of an AutoencoderKL; latents that are pixels need none")
        self._autoencoder, self._cache, self._sample = autoencoder, cache, sample
        self._stream: torch.cuda.Stream | None = None
        # torch's own threads would compete with the training step's
        self._pool: Executor = (
            ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
            if workers
            else ThreadPoolExecutor(_THREADS, "decode", torch.set_num_threads, (1,))
        )

    def read(self, drafts: Sequence[Draft]) -> list[tuple[Content, ...] | SampleError]:
        """The pictures of each draft, one or two; or the reason why there are none."""
        opened = [_opened(draft) for draft in drafts]
        found = [(each, draft.size) for pictures, draft in zip(opened, drafts, strict=True) for each in pictures]
        samples = [each for each, _ in found if not isinstance(each, SampleError)]
        sizes = [size for each, size in found if not isinstance(each, SampleError)]
        read: Iterator[Content | SampleError]
        if self._cache is None:
            # pixels in memory are ready sooner than another thread would be
            in_memory = all(not isinstance(sample.content, bytes | FileSlice) for sample in samples)
            read = iter(list((map if in_memory else self._pool.map)(_pixels, samples, sizes)))
        else:
            read = iter(list(map(self._moments, samples, sizes, self._pool.map(_content_key, samples))))
        return [_whole([e if isinstance(e, SampleError) else next(read) for e in pictures]) for pictures in opened]

    def latent(self, content: Content, generator: torch.Generator) -> Tensor:
        """-> (C, h, w) float32, each image encoded by itself, so that no batch changes it."""
        draws = generator if self._sample else None
        if isinstance(content, np.ndarray):
            with self._beside_training():
                return self._autoencoder.encode(from_levels(content)[None], draws)[0].cpu()
        assert isinstance(self._autoencoder, DiffusersAutoencoder)
        return self._autoencoder.latents(content[None], draws)[0]

    def _beside_training(self) -> AbstractContextManager[None]:
        """A separate CUDA stream: on the training step's, every image would wait for everything queued there."""
        if not isinstance(self._autoencoder, DiffusersAutoencoder) or self._autoencoder.device.type != "cuda":
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._autoencoder.device)
            self._stream.wait_stream(torch.cuda.default_stream(self._autoencoder.device))  # which made the weights
        stream: AbstractContextManager[None] = torch.cuda.stream(self._stream)
        return stream

    def _moments(self, sample: CaptionedImage, size: Size, key: str | SampleError) -> Tensor | SampleError:
        assert self._cache is not None
        if isinstance(key, SampleError):
            return key
        if (entry := entry_key(key, size)) in self._cache:
            return self._cache.read(entry)
        pixels = _pixels(sample, size)
        if isinstance(pixels, SampleError):  # an unreadable image was never encoded
            return pixels
        where = self._cache.folder
        raise ValueError(f"{sample.name} is not in the latent cache {where}: run `transfusion encode` first")


def _start_worker() -> None:
    """Sets a worker to one thread and to ignore Ctrl-C, which reaches every process of the terminal: the one that
    trains still needs a batch to end its step and save."""
    torch.set_num_threads(1)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _opened(draft: Draft) -> tuple[CaptionedImage | SampleError, ...]:
    try:
        return draft.open().pictures
    except SampleError as error:
        return (error,)


def _whole(pictures: list[Content | SampleError]) -> tuple[Content, ...] | SampleError:
    """All pictures of a draft, or the reason why one is missing."""
    wrong = next((each for each in pictures if isinstance(each, SampleError)), None)
    return tuple(each for each in pictures if not isinstance(each, SampleError)) if wrong is None else wrong


def _pixels(sample: CaptionedImage, size: Size) -> np.ndarray | SampleError:
    try:
        return crop(sample.image, size)
    except SampleError as error:
        return error


def _content_key(sample: CaptionedImage) -> str | SampleError:
    try:
        return sample.key
    except SampleError as error:
        return error
