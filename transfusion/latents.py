"""transfusion train-vae | encode: train an autoencoder on your own images, and keep their latents for training."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated


def train_vae(arguments: Sequence[str]) -> int:
    """`transfusion train-vae --images ... --out DIR [--image-size 64 --steps 3000 ...]`."""
    import tyro

    from transfusion.cli import pick_device
    from transfusion.data import DataConfig, LoaderConfig, image_source
    from transfusion.files import alone_in
    from transfusion.training.autoencoder import AutoencoderConfig, AutoencoderTrainer, feature_distance

    @dataclass(frozen=True)
    class Options:
        """Train a small AutoencoderKL on images, or resume the one in `out`; `--data.autoencoder OUT` then uses it.

        Args:
            images: as for `transfusion train --data.images`: a folder with captions.jsonl, tar shards, emoji, ... Of an
                edit, only the edited image is used.
            out: the autoencoder's folder.
            perceptual: a TorchScript file of a network from images (I, 3, H, W) in [0, 1] to features; the squared
                distance of features is then added to the loss.
            device: "auto" is CUDA where there is one.
        """

        images: tuple[str, ...]
        out: Path
        perceptual: Path | None = None
        device: str = "auto"
        config: Annotated[AutoencoderConfig, tyro.conf.arg(name="")] = field(default_factory=AutoencoderConfig)

    options = tyro.cli(Options, args=list(arguments), prog="transfusion train-vae")
    device = pick_device(options.device)
    loader = LoaderConfig(rows=1, image_size=options.config.image_size)
    images = image_source(DataConfig(images=options.images, texts="", loader=loader), "train", limit=1_000_000)
    if images is None:
        raise ValueError("no images: give --images")
    perceptual = feature_distance(options.perceptual, device) if options.perceptual else None
    with alone_in(options.out):
        trainer = AutoencoderTrainer(options.config, images, options.out, device, perceptual)
        finished = trainer.run()
    print(f"{options.out}: {'finished' if finished else 'stopped; the same command resumes it'}")
    if trainer.skipped:
        print(f"{len(trainer.skipped)} image(s) could not be read, the first: {next(iter(trainer.skipped))}")
    if finished:
        print(f"see {options.out / 'reconstructions.png'}; use it with --data.autoencoder {options.out}")
    return 0


def encode(arguments: Sequence[str]) -> int:
    """`transfusion encode [--config FILE | RECIPE] --data.images ... --data.autoencoder DIR --data.latent-cache X`."""
    import tyro
    from tqdm import tqdm

    from transfusion import config as configs
    from transfusion import recipes
    from transfusion.cli import pick_device
    from transfusion.data import DataConfig, DiffusersAutoencoder, make_autoencoder
    from transfusion.data.config import all_images, open_cache, specs
    from transfusion.data.latent_cache import encode_images
    from transfusion.data.transforms import bucket_sizes, check_image_size
    from transfusion.files import alone_in
    from transfusion.run_config import RunConfig

    @dataclass(frozen=True)
    class Start:
        """Encode every training image once, into `data.latent_cache`; entries that are there already are kept.

        Args:
            config: a TOML file of a run, or the name of a recipe, whose [data] is read; the options below override its
                fields.
            shard_entries: images in one file of the cache; so many latents are held in memory.
            device: "auto" is CUDA where there is one.
        """

        config: Path | None = None
        shard_entries: int = 1024
        device: str = "auto"

    @dataclass(frozen=True)
    class Options(Start):
        __doc__ = Start.__doc__
        data: DataConfig = field(default_factory=DataConfig)

    start, _ = tyro.cli(Start, args=[a for a in arguments if a not in ("-h", "--help")], return_unknown_args=True)
    data = configs.load(RunConfig, recipes.find(start.config)).data if start.config else DataConfig()
    options = tyro.cli(Options, args=list(arguments), default=Options(data=data), prog="transfusion encode")
    data, device = options.data, pick_device(options.device)
    if not specs(data.images):
        raise ValueError("no images to encode: give --data.images")
    if not data.latent_cache:
        raise ValueError("nowhere to keep latents: give --data.latent-cache DIR")
    autoencoder = make_autoencoder(data, device)
    with alone_in(Path(data.latent_cache)):
        cache = open_cache(data, autoencoder, repair=True)
        assert isinstance(autoencoder, DiffusersAutoencoder)  # else there is no cache
        if not data.loader.aspect_ratios:
            check_image_size(data.loader.image_size, autoencoder.downscale, data.loader.patch_size)
        step = autoencoder.downscale * data.loader.patch_size
        sizes = bucket_sizes(data.loader.aspect_ratios, data.loader.image_size, step)
        images = tqdm(all_images(data, "train"), unit="image", disable=not sys.stderr.isatty())
        count, skipped = encode_images(images, sizes, autoencoder, cache, options.shard_entries, device)
    print(f"{cache.folder}: {count} image(s) encoded, {len(cache)} in all, {len(skipped)} skipped")
    for name, reason in skipped[:10]:
        print(f"  skipped {name}: {reason}")
    return 0
