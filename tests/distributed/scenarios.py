"""What the processes of a world do in the tests; each function runs on every rank and returns what is to be judged."""

import datetime
import math
import os
import random
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from transfusion.config import ModelConfig, UNetConfig
from transfusion.kernels import RaggedLatents
from transfusion.sequence import Batch, Image, SpecialTokens, Text, collate
from transfusion.training import ParallelConfig, TrainConfig, Trainer, World, distribute, materialize
from transfusion.training.parallel import local, whole
from transfusion.training.world import _mesh

CONFIG = TrainConfig(
    steps=3,
    learning_rate=1e-2,
    warmup_steps=2,
    eps=1e-2,  # AdamW's own divides gradients near zero, which are all rounding, by next to nothing
    log_every=1,
    checkpoint_every=100,
    ema_decay=0.9,
    impl="reference",
)
UNET = replace(tiny.CONFIG, codec="unet", unet=UNetConfig(width=16, deep_width=32, blocks=1, head_dim=16))
MATRIX = list(product(("none", "full", "selective"), ("none", "aot_eager")))
SEED = 5
TIMEOUT = datetime.timedelta(seconds=30)


class Mixed(tiny.Batches):
    """Every other batch is text alone, or images alone: in a world of two, each rank lacks a modality in turn."""

    def batch(self, step: int) -> Batch:
        if step % 3 == 0:
            return super().batch(step)
        rows = [[(Text(torch.arange(1, 9)),)]] if step % 3 == 1 else [[(Text(torch.tensor([1])), *_image(step))]]
        generator = torch.Generator().manual_seed(step)
        return collate(rows, self.length, tiny.CONFIG.patch_size, SpecialTokens(), generator)


class Gray(tiny.Batches):
    """Images of one channel: of the U-Net's last convolution, all but one rank hold nothing."""

    def batch(self, step: int) -> Batch:
        batch = super().batch(step)
        assert isinstance(batch.latents, torch.Tensor)
        return replace(batch, latents=batch.latents[:, :1].contiguous())


class Ragged(tiny.Batches):
    """Images of mixed sizes; in a world of two they meet images of one size, and text alone, on the other rank."""

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        sizes = ([(4, 4), (2, 6), (8, 4)], [(4, 6), (4, 6)], [])[step % 3]
        images = [Image(torch.randn(3, *size, generator=generator)) for size in sizes]
        words = [Text(torch.randint(5, 40, (5,), generator=generator)) for _ in range(3)]
        rows = [[(words[0], *images[:2]), (words[1],)], [(words[2], *images[2:])]]
        batch = collate(rows, self.length, tiny.CONFIG.patch_size, SpecialTokens(), generator)
        assert isinstance(batch.latents, RaggedLatents) == (step % 3 == 0)
        return batch


def _image(step: int) -> Any:
    return [segment for segment in tiny.document(random.Random(step)) if not isinstance(segment, Text)]


def trainer(
    world: World,
    folder: Path,
    parallel: ParallelConfig | None = None,
    source: type[tiny.Batches] = tiny.Batches,
    dtype: torch.dtype = torch.float32,
    model_config: ModelConfig = tiny.CONFIG,
    **changes: Any,
) -> Trainer:
    """A trainer of the tiny model on `world`, from the initial weights of SEED; `accumulation` batches on each rank."""
    parallel = parallel or ParallelConfig()
    config = replace(CONFIG, parallel=parallel, **changes)
    with torch.device("meta"):
        model = tiny.Transfusion(model_config).to(dtype)
    distribute(model, parallel, config.precision, world)
    materialize(model, world.device, SEED)
    if dtype == torch.float64:  # the same weights, not other draws
        plain = materialized(model_config)
        model.load_state_dict({name: value.double() for name, value in plain.state_dict().items()})
    return Trainer(model, source(rank=world.rank, ranks=world.size), config, folder, None, world)


def materialized(config: ModelConfig = tiny.CONFIG) -> Any:
    """The tiny model as one process initialises it."""
    with torch.device("meta"):
        model = tiny.Transfusion(config)
    materialize(model, torch.device("cpu"), SEED)
    return model


def weights(each: Trainer) -> torch.Tensor:
    """All weights, averages and moments, put together from all ranks."""
    tensors = (t for name, t in each._tensors().items() if name != "skipped_steps")
    return torch.cat([whole(tensor).flatten().double() for tensor in tensors])


def steps(each: Trainer, count: int = 3) -> dict[str, torch.Tensor]:
    """Losses and gradient norms of some steps over the whole world, the weights after them and their average."""
    batches, seen = each.loader.iterate(), []
    for _ in range(count):
        each.train_step(batches)
        each.step += 1
        values = each.losses_seen.read()
        seen.append([values["text_loss"], values["image_loss"], values["gradient_norm"]])
    return {
        "losses": torch.tensor(seen),
        "weights": torch.cat([whole(p.detach()).flatten() for p in each.parameters.values()]),
        "average": torch.cat([whole(weight).flatten() for weight in each.ema.values()]),
    }


# ---------------------------------------------------------------- two ranks


def pair(world: World, folder: Path) -> dict[str, Any]:
    """All that two ranks can show without dying."""
    return {name: scenario(world, folder / name) for name, scenario in PAIR.items()}


def matrix(world: World, folder: Path) -> dict[Any, Any]:
    """Every way to recompute and to compile."""
    return {
        (checkpointing, compile): steps(
            trainer(world, folder, ParallelConfig(checkpointing=checkpointing, compile=compile))
        )
        for checkpointing, compile in MATRIX
    }


INPUTS: dict[str, dict[str, Any]] = {
    "unet": {"model_config": UNET},
    "unet_mixed": {"model_config": UNET, "source": Mixed},
    "ragged": {"source": Ragged},
}
LOW: dict[str, dict[str, Any]] = {
    "bfloat16": {"precision": "bfloat16"},
    "unet_bfloat16": {"model_config": UNET, "precision": "bfloat16"},
    "ragged_bfloat16": {"source": Ragged, "precision": "bfloat16"},
}
GRAY: dict[str, Any] = {"model_config": replace(UNET, latent_channels=1), "source": Gray}


def variants(world: World, folder: Path) -> dict[str, Any]:
    """Accumulation, weights kept between forward and backward, one copy on each rank, ranks without a modality."""
    copies = replace(world, mesh=_mesh(world.device, world.size, 1, TIMEOUT))
    return {
        "accumulation": steps(trainer(world, folder, accumulation=2)),
        "kept": steps(trainer(world, folder, ParallelConfig(reshard_after_forward=False))),
        "replicated": steps(trainer(copies, folder)),
        "mixed": steps(trainer(world, folder, source=Mixed)),
        **{name: steps(trainer(world, folder, **changes)) for name, changes in (INPUTS | LOW).items()},
    }


def sharded_alone(world: World, folder: Path) -> dict[str, Any]:
    """The variants in bfloat16 by one rank that shards its weights with no other. It rounds what two ranks round;
    autocast keeps the sum of the blocks in float32."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    one = replace(world, mesh=_mesh(world.device, 1, 1, TIMEOUT), control=dist.group.WORLD)
    return {name: steps(trainer(one, folder, accumulation=2, **changes)) for name, changes in LOW.items()}


def reduced(world: World, folder: Path) -> torch.Tensor:
    """The gradients of one batch on each rank, computed in bfloat16 and averaged over the ranks."""
    model = trainer(world, folder, precision="bfloat16").model
    return gradients(model, world.rank)


def initial(world: World, folder: Path) -> torch.Tensor:
    """The weights before the first step, of which each rank holds a part."""
    each = trainer(world, folder)
    assert all(local(p).numel() < p.numel() for p in each.parameters.values())
    return torch.cat([whole(p.detach()).flatten() for p in each.parameters.values()])


def resumed(world: World, folder: Path) -> dict[str, Any]:
    """Ten steps in one go; and five, a checkpoint, five more in another trainer."""
    whole_run = trainer(world, folder / "whole", steps=10)
    assert whole_run.run()
    first = trainer(world, folder / "parts", steps=10)
    steps(first, 5)
    first.save()
    at_five = weights(first)
    second = trainer(world, folder / "parts", steps=10)
    assert second.run()
    return {"whole": weights(whole_run), "parts": weights(second), "at five": at_five}


def beside(world: World, folder: Path) -> dict[str, Any]:
    """A checkpoint that is written while training goes on holds the step at which it was begun."""
    each = trainer(world, folder, async_checkpoint=True, steps=10)
    steps(each, 2)
    path, then = each.save(), weights(each)
    steps(each, 2)
    each.checkpoints.wait()
    again = trainer(world, folder, steps=10)
    again.resume()
    return {"then": then, "read": weights(again), "step": again.step, "path": path.name}


def gray_unet(world: World, folder: Path) -> dict[str, torch.Tensor]:
    """Steps of a U-Net whose last convolution rank 1 holds nothing of, and all that is in its checkpoint."""
    each = trainer(world, folder, **GRAY)
    assert world.rank == 0 or not local(each.parameters["codec.output.weight"]).numel()
    result = steps(each)
    each.save()
    return {**result, "saved": weights(each)}


def poisoned(world: World, folder: Path) -> dict[str, Any]:
    """One rank's second batch is not finite."""

    class Poisoned(tiny.Batches):
        def batch(self, step: int) -> Batch:
            batch = super().batch(step)
            return replace(batch, latents=batch.latents * math.nan) if step == 3 else batch

    each = trainer(world, folder, source=Poisoned)
    batches, after = each.loader.iterate(), []
    for _ in range(3):
        each.train_step(batches)
        after.append(torch.cat([local(p.detach()).flatten().clone() for p in each.parameters.values()]))
    return {"after": after, "skipped": int(each.losses_seen.skipped), "average": weights(each)}


def stopped(world: World, folder: Path) -> dict[str, Any]:
    """One rank is asked to stop."""

    class Stopping(tiny.Batches):
        def batch(self, step: int) -> Batch:
            if step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(step)

    each = trainer(world, folder, source=Stopping, steps=10)
    return {"finished": each.run(), "step": each.step, "checkpoints": [p.name for p in each.checkpoints.paths()]}


def full_disk(world: World, folder: Path) -> dict[str, Any]:
    """The disk of one rank is full; a file size limit stands in for it."""
    each = trainer(world, folder)
    steps(each, 1)
    each.save()
    world.total([0])
    steps(each, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        each.save()
        message = ""
    except OSError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    world.total([0])
    return {"message": message, "left": sorted(path.name for path in (folder / "checkpoints").iterdir())}


def mistaken(world: World, folder: Path) -> None:
    """A start that rank 0 refuses."""

    def make() -> None:
        raise ValueError("nothing to train on")

    world.main_first(make)


def errors(world: World, folder: Path) -> list[tuple[str, str]]:
    """Samples that a rank cannot use are written down with its name."""

    class Broken(tiny.Batches):
        skipped = ((f"image {world.rank}", "is broken"),)  # type: ignore[assignment]

    trainer(world, folder, source=Broken, steps=2).run()
    return []


def averaged(world: World, folder: Path) -> dict[str, Any]:
    """The model that is saved at the end."""
    each = trainer(world, folder)
    steps(each, 2)
    model = each.averaged("cpu")
    ema = {name: whole(value) for name, value in each.ema.items()}
    return {"model": None if model is None else model.state_dict(), "ema": ema}


PAIR: dict[str, Callable[[World, Path], Any]] = {
    scenario.__name__: scenario
    for scenario in (
        matrix,
        variants,
        reduced,
        initial,
        resumed,
        beside,
        gray_unet,
        poisoned,
        stopped,
        full_disk,
        errors,
        averaged,
    )
}


# ---------------------------------------------------------------- other worlds


def four(world: World, folder: Path) -> dict[str, Any]:
    """Goes on from the checkpoint of two ranks in `folder`, in shards of two that are replicated twice."""
    pairs = replace(world, mesh=_mesh(world.device, 4, 2, TIMEOUT))
    each = trainer(pairs, folder, steps=10)
    each.resume()
    read = weights(each)
    return {"step": each.step, "position": each.loader.state_dict(), "read": read, **steps(each)}


def gradients(model: Any, batch: int = 0) -> torch.Tensor:
    """Of a batch's loss, averaged over all ranks and put together from them."""
    model(tiny.Batches().batch(batch)).total.backward()
    return torch.cat([whole(parameter.grad).flatten() for parameter in model.parameters()])


def apart(world: World, folder: Path) -> dict[str, Any]:
    """Gradients where head and codec are sharded each by itself, and not by `distribute`; all ranks have one batch."""
    made = {}
    for config in (tiny.CONFIG, UNET):
        model = materialized(config)
        for part in (model.head, model.codec, model):
            fully_shard(part, mesh=world.mesh)
        for name in ("encode", "decode"):  # which no call of the module leads to
            register_fsdp_forward_method(model.codec, name)
        made[config.codec] = gradients(model)
    return made


def killed_in_a_step(world: World, folder: Path) -> None:
    """Rank 1 dies in its third batch."""

    class Dying(tiny.Batches):
        def batch(self, step: int) -> Batch:
            if step == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().batch(step)

    trainer(world, folder, source=Dying, steps=10).run()


def killed_in_a_save(world: World, folder: Path) -> None:
    """Both ranks die in the middle of writing their second checkpoint, with some of it on disk."""
    from torch.distributed.checkpoint import filesystem

    each = trainer(world, folder, steps=10)
    steps(each, 2)
    each.save()
    steps(each, 2)
    write = filesystem._write_item

    def dying(*args: Any, **kwargs: Any) -> Any:
        write(*args, **kwargs)
        args[1].flush()
        os.kill(os.getpid(), signal.SIGKILL)

    filesystem._write_item = dying
    each.save()
