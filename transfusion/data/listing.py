"""Samples as a list: the first of a stream, or several sources one after the other."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TypeVar

from transfusion.data.drafting import Images
from transfusion.data.sources import CaptionedImage, ImageSource, SampleError, Skipped, edits_of
from transfusion.data.streams import Stream

T = TypeVar("T")


def in_order(stream: Stream[T]) -> Iterator[T]:
    """The samples of a stream, shard after shard, once."""
    for shard in range(stream.num_shards):
        for _, sample in stream.read(shard):
            yield sample


def each_image(source: ImageSource) -> Iterator[CaptionedImage | SampleError]:
    """The samples of a source, one after the other; in place of an unreadable one, the reason."""
    for index in range(len(source)):
        try:
            yield source[index]
        except SampleError as error:
            yield error


class DrawnImages:
    """A source of samples that were drawn from a stream."""

    def __init__(self, samples: list[CaptionedImage], skipped: list[Skipped]) -> None:
        self._samples, self.skipped = samples, skipped
        self.names = [sample.name for sample in samples]
        self.captions = [sample.caption for sample in samples]
        self.edits = {index: sample.before.name for index, sample in enumerate(samples) if sample.before is not None}

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> CaptionedImage:
        return self._samples[index]


class JoinedImages:
    """Several sources as one; its samples are theirs, one source after the other."""

    def __init__(self, sources: Sequence[ImageSource]) -> None:
        self._places = [(source, index) for source in sources for index in range(len(source))]
        self.names = [name for source in sources for name in source.names]
        self.captions = [caption for source in sources for caption in source.captions]
        edits = [(edits_of(source), index) for source, index in self._places]
        self.edits = {place: known[index] for place, (known, index) in enumerate(edits) if index in known}
        self.skipped = [skip for source in sources for skip in source.skipped]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> CaptionedImage:
        source, place = self._places[index]
        return source[place]


def listed_images(images: Images, limit: int) -> ImageSource:
    """A map-style source as it is; of a stream, the first `limit` samples."""
    return DrawnImages(list(islice(in_order(images), limit)), images.skipped) if isinstance(images, Stream) else images
