"""A run is a folder: config.toml, tokenizer.json, checkpoints/, log.jsonl, tensorboard/, and model/ at the end.

Run.start(config, directory, "cuda").train()     starts the run, or resumes the one that is there
Run.open(directory, "cuda")                      what evaluation and sampling work on, finished or not

With several processes, give a `World` in place of the device; all of them make the call, and only rank 0 writes.
"""

import contextlib
import functools
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from transfusion import config as configs
from transfusion.data import (
    Autoencoder,
    Loader,
    Tokenizer,
    image_source,
    make_autoencoder,
    make_loader,
    text_source,
)
from transfusion.data.config import check_sources
from transfusion.data.documents import caption_image_length
from transfusion.data.drafting import caption_ids
from transfusion.data.sources import ImageSource, Split, edits_of
from transfusion.data.transforms import Size, bucket_sizes, check_image_size, nearest_size
from transfusion.diffusion.sampler import default_steps, make_scheduler
from transfusion.evaluation import (
    evenly,
    image_distances,
    image_figures,
    load_features,
    pictures,
    read_images,
    sheets,
    text_figures,
)
from transfusion.files import write_whole
from transfusion.generation import TransfusionPipeline
from transfusion.generation.pipeline import CONFIG as PIPELINE
from transfusion.model import Transfusion
from transfusion.model.pretrained import read_weights
from transfusion.run_config import (
    CONFIG,
    LENGTH,
    MODEL,
    TOKENIZER,
    RunConfig,
    differences,
    from_anywhere,
    saved_pipeline,
    saved_tokenizer,
)
from transfusion.sequence import image_tokens
from transfusion.training import Trainer, World, distribute, materialize
from transfusion.training.checkpoint import last_step, written
from transfusion.training.optimizer import learning_rate
from transfusion.training.trainer import CHECKPOINTS, Preview, read_averaged

logger = logging.getLogger(__name__)

Place = torch.device | str | World  # where a run computes
STEP = "trained_steps"  # in model/
_PREVIEWED = 16  # captions


class _Sample(NamedTuple):
    """A caption and its pictures (3, H, W) in [-1, 1]; the last is the one that it describes or asks for."""

    caption: str
    pictures: tuple[torch.Tensor, ...]


def train_tokenizer(config: RunConfig) -> Tokenizer:
    """A byte-level BPE of the run's own captions and texts. Raises `ValueError` where it has neither."""
    check_sources(config.data)
    images, texts = image_source(config.data, "train"), text_source(config.data, "train")
    corpus = [texts[index] for index in range(len(texts))] if texts else []
    return Tokenizer.train([*corpus, *(images.captions if images else [])], config.model.vocab_size)


def _says(file: Path, config: RunConfig) -> bool:
    try:
        return configs.load(RunConfig, file) == config
    except (FileNotFoundError, ValueError):
        return False


class Run:
    """A run's folder and what is in it; `world.device` is where its networks compute."""

    def __init__(self, directory: Path, config: RunConfig, tokenizer: Tokenizer, on: Place = "cpu") -> None:
        self.directory, self.config, self.tokenizer = directory, config, tokenizer
        self.world = on if isinstance(on, World) else World(torch.device(on))

    @staticmethod
    def start(config: RunConfig, directory: Path, on: Place = "cpu") -> "Run":
        """The run in `directory`, begun where nothing has been learned there yet; a start that fails leaves nothing.

        One that is there may be resumed with another cut of its batch (rows, accumulation, ranks), another log and
        another number of steps, which its config.toml then says; any other change to its config raises `ValueError`.
        """
        world = on if isinstance(on, World) else World(torch.device(on))
        return world.main_first(
            lambda: Run._start(config, directory, world) if world.main else Run.open(directory, world)
        )

    @staticmethod
    def _start(config: RunConfig, directory: Path, world: World) -> "Run":
        config = from_anywhere(config)
        if written(directory / CHECKPOINTS) or (directory / MODEL / PIPELINE).is_file():
            run = Run(directory, config, Run.open(directory).tokenizer, world)
            run._check_changes()
        else:
            tokenizer = saved_tokenizer(config) if config.init else train_tokenizer(config)
            run = Run(directory, config, tokenizer, world)
            run.loader  # noqa: B018 - its mistakes come before anything is written
            directory.mkdir(parents=True, exist_ok=True)
            run.tokenizer.save(directory / TOKENIZER)
        if not _says(directory / CONFIG, config):  # a file that says the same keeps its comments
            configs.save(config, directory / CONFIG)  # last: a folder with a config is a whole run
        return run

    def _check_changes(self) -> None:
        """Raises `ValueError` if the folder's run cannot be resumed with this config; prints what another length
        does."""
        before, last = Run.open(self.directory).config, last_step(self.directory / CHECKPOINTS)
        if last is None and (self.directory / MODEL / PIPELINE).is_file():
            raise ValueError(
                f"{self.directory} has a trained {MODEL}/ and no checkpoint to go on from; start a run from it with "
                f"--init {self.directory / MODEL} --out ANOTHER, or delete it"
            )
        done = last or 0
        changed = differences(configs.to_dict(from_anywhere(before)), configs.to_dict(self.config))
        if changed:
            raise ValueError(
                f"{self.directory} holds a run with another config ({'; '.join(changed)}); "
                "give another directory, or delete it"
            )
        if self.config.train.steps < done:
            raise ValueError(
                f"train.steps {self.config.train.steps} is fewer than the {done} that {self.directory} has trained "
                f"already; give {done} or more"
            )
        lengths = [
            f"train.{name} {getattr(before.train, name)}, now {getattr(self.config.train, name)}"
            for name in LENGTH
            if getattr(before.train, name) != getattr(self.config.train, name)
        ]
        if lengths:
            old_rate, rate = (learning_rate(done, config.train) for config in (before, self.config))
            message = "%s: %s: the learning rate's cosine now ends at step %d; at step %d it is %.3g, not %.3g"
            logger.warning(message, self.directory, "; ".join(lengths), self.config.train.steps, done, rate, old_rate)

    @staticmethod
    def open(directory: Path, on: Place = "cpu") -> "Run":
        """The run in `directory`. Raises `FileNotFoundError` where there is none."""
        if not (directory / CONFIG).is_file():
            raise FileNotFoundError(f"{directory} holds no run: it has no {CONFIG}; start one with `transfusion train`")
        config = configs.load(RunConfig, directory / CONFIG)
        return Run(directory, config, Tokenizer.load(directory / TOKENIZER), on)

    @functools.cached_property
    def autoencoder(self) -> Autoencoder:
        """Pixels to latents and back."""
        made = make_autoencoder(self.config.data, self.world.device)
        model, loader, problems = self.config.model, self.config.data.loader, []
        if made.latent_channels != model.latent_channels:
            problems.append(
                f"model.latent_channels {model.latent_channels} differs from the {made.latent_channels} channels of "
                f"the autoencoder {self.config.data.autoencoder}: give --model.latent-channels {made.latent_channels}"
            )
        try:
            check_image_size(loader.image_size, made.downscale, loader.patch_size)
        except ValueError as error:
            problems.append(f"{error}, with --data.loader.image-size, or other patches")
        if problems:
            raise ValueError("; ".join(problems))
        return made

    @property
    def sizes(self) -> list[Size]:
        """(height, width) in pixels of the images: one, or one for each aspect ratio."""
        loader = self.config.data.loader
        return bucket_sizes(loader.aspect_ratios, loader.image_size, self.autoencoder.downscale * loader.patch_size)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one image; if shapes differ, the one nearest to square, the first of equals."""
        height, width = nearest_size(1, 1, self.sizes)
        downscale = self.autoencoder.downscale
        return (self.config.model.latent_channels, height // downscale, width // downscale)

    @functools.cached_property
    def loader(self) -> Loader:
        """The training batches of this rank, starting with the first."""
        if self.tokenizer.special != self.config.model.special:
            raise ValueError(
                f"model.special {self.config.model.special} is not what the tokenizer has, {self.tokenizer.special}: "
                "leave model.special out"
            )
        return make_loader(self.config.data, self.tokenizer, self.autoencoder, self.world.rank, self.world.size)

    def train(self) -> bool:
        """Trains to the last step, then writes model/, a pipeline with the averaged weights. -> False if stopped
        before."""
        with torch.device("meta"):
            model = Transfusion(self.config.model)
        distribute(model, self.config.train.parallel, self.config.train.precision, self.world)
        fresh = self.config.init and not written(self.directory / CHECKPOINTS)
        weights = read_weights(saved_pipeline(self.config.init)) if fresh else None
        materialize(model, self.world.device, self.config.seed, weights)
        preview = self._preview(self.loader.max_caption_tokens)
        trainer = Trainer(model, self.loader, self.config.train, self.directory, preview, self.world)
        finished = trainer.run()
        averaged = trainer.averaged("cpu") if finished else None
        if averaged is not None:
            self.pipeline(averaged).save_pretrained(self.directory / MODEL)
            write_whole(self.directory / MODEL / STEP, f"{self.config.train.steps}\n")
        return finished

    def _preview(self, longest: int) -> Preview | None:
        """What `train.preview_every` shows: images drawn for captions of the training set, spread evenly over it, each
        of its image's size, and before each edit what it changes."""
        images = image_source(self.config.data, "train") if self.config.train.preview_every else None
        samples = self._readable(images, evenly(len(images), _PREVIEWED), longest) if images else []
        if not samples:
            return None
        steps = default_steps(self.config.model.schedule, about=20)
        make_scheduler(self.config.model.schedule)  # raises now, not at the first picture, if diffusers is missing

        def preview(model: Transfusion) -> np.ndarray:
            pairs = zip(samples, self._drawn(model, samples, steps=steps), strict=True)
            return sheets.contact_sheet([p for each, new in pairs for p in (*each.pictures[:-1], new)])

        return preview

    def _step_of_model(self) -> int:
        """The step of model/, which is not the last step if a longer run was stopped before it could write it anew."""
        file = self.directory / MODEL / STEP
        return int(file.read_text()) if file.is_file() else self.config.train.steps

    def model(self) -> Transfusion:
        """The trained model; for a run that has not finished, after a message, the averaged weights of its last
        checkpoint.

        Raises `FileNotFoundError` where there is neither.
        """
        checkpoints, steps = self.directory / CHECKPOINTS, self.config.train.steps
        done = last_step(checkpoints)
        if (self.directory / MODEL / PIPELINE).is_file() and (done is None or done >= steps == self._step_of_model()):
            return Transfusion.from_pretrained(self.directory / MODEL, self.world.device).eval()
        if done is None:
            raise FileNotFoundError(
                f"{self.directory} has not finished (step 0 of {steps}) and has no checkpoint yet; "
                f"`transfusion train --out {self.directory}` goes on with it"
            )
        message = "%s has not finished (step %d of %d): using its averaged weights"
        logger.warning(message, self.directory, done, steps)
        return read_averaged(written(checkpoints)[-1], self.config.model).to(self.world.device)

    def evaluate(self, model: Transfusion, draws: int = 8, seed: int = 0) -> dict[str, Any]:
        """The figures of `metrics.json`: text (held out), images of the training and of the held-out split, each of the
        size that training gives it.

        draws: timesteps, with fresh noise, that each image is judged at; they are spread evenly over the path.
        """
        data = self.config.data
        figures: dict[str, Any] = {"parameters": model.num_parameters()}
        texts = text_source(data, "test")
        if texts is not None:
            figures["text_held_out"] = text_figures(model, self.tokenizer, texts, data.loader.row_length)
        splits: tuple[tuple[Split, str], ...] = (("train", "images_train"), ("test", "images_held_out"))
        for split, name in splits:
            images = image_source(data, split)
            if images is not None:
                samples, skipped = read_images(
                    images,
                    self.tokenizer,
                    self.autoencoder,
                    self.sizes,
                    functools.partial(self._room, images, self._longest),
                )
                figures[name] = image_figures(model, samples, draws, seed) | {"skipped": skipped}
        return figures

    @property
    def _largest(self) -> int:
        """Tokens of an image of the largest size."""
        pixels = self.autoencoder.downscale * self.config.data.loader.patch_size
        return max(image_tokens(size, pixels) for size in self.sizes)

    @property
    def _longest(self) -> int:
        """Tokens of a caption that fits in a row beside an image of the largest size."""
        return self.config.data.loader.row_length - caption_image_length(0, self._largest)

    def distances(
        self, model: Transfusion, features: str | Path, samples: int = 256, guidance_scale: float = 3.0, seed: int = 0
    ) -> dict[str, Any]:
        """How far images that `model` draws for at most `samples` captions are from the images that have them.

        The images are held out where the run holds out two or more, and `split` says so; a distance needs two. Raises
        `ValueError` where the run has fewer. Each is drawn at the size that training crops its image to, and
        `image_distances` tells what becomes of several sizes. features: what `load_features` takes.
        """
        device = model.head.weight.device
        network = load_features(features, device)
        splits: tuple[Split, ...] = ("test", "train")
        for split in splits:
            source = image_source(self.config.data, split)
            chosen = self._readable(source, evenly(len(source), samples), self._longest) if source else []
            if len(chosen) > 1:
                break
        else:
            raise ValueError(
                f"a distance needs two images or more; of {samples} that were asked for, {len(chosen)} of data.images "
                "can be read"
            )
        generated = self._drawn(model, chosen, guidance_scale=guidance_scale, seed=seed)
        sets = [sample.pictures[-1].to(device) for sample in chosen], [image.to(device) for image in generated]
        distances = image_distances(*sets, network, seed=seed)
        return {"split": split, **distances}

    def _readable(self, source: ImageSource, indices: Iterable[int], longest: int) -> list[_Sample]:
        """Samples `indices` of `source` that can be used. longest: tokens of a caption that fits beside one image."""
        samples, sizes = [], self.sizes
        for index in indices:
            with contextlib.suppress(ValueError):  # a SampleError is one
                caption_ids(self.tokenizer, source.captions[index], self._room(source, longest, index))
                samples.append(_Sample(source.captions[index], pictures(source[index], sizes)))
        return samples

    def _room(self, source: ImageSource, longest: int, index: int) -> int:
        """Tokens of a caption that fits with sample `index`: beside one image `longest`, of an edit beside two."""
        beside_two = self.config.data.loader.row_length - caption_image_length(0, self._largest, images=2)
        return beside_two if index in edits_of(source) else longest

    def _drawn(
        self, model: Transfusion, samples: Sequence[_Sample], seed: int = 0, **options: Any
    ) -> list[torch.Tensor]:
        """(3, H, W) of each: what `model` draws for its caption, of the size of its pictures, after the image before it
        where it is an edit. Sample i starts from the noise of seed + i; those of one size are drawn together."""
        pipeline, drawn = self.pipeline(model), dict[int, torch.Tensor]()
        shapes = [tuple(each.pictures[-1].shape[1:]) for each in samples]
        for height, width in dict.fromkeys(shapes):
            chosen = [index for index, shape in enumerate(shapes) if shape == (height, width)]
            given = [samples[index].pictures[:-1] for index in chosen]
            images = pipeline.images(
                [samples[index].caption for index in chosen],
                image=[(before[0] + 1) / 2 if before else None for before in given],
                height=height,
                width=width,
                seed=[seed + index for index in chosen],
                **options,
            )
            drawn |= zip(chosen, images, strict=True)
        return [drawn[index] for index in range(len(samples))]

    def pipeline(self, model: Transfusion) -> TransfusionPipeline:
        """Captions, pictures and texts in and out of `model`, this run's or one of its previews."""
        longest = self.config.data.loader.row_length
        return TransfusionPipeline(model, self.tokenizer, self.autoencoder, self.latent_shape, longest)
