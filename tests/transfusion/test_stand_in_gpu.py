"""The way through the library that only a GPU takes, without one: tensors of "cuda:0" that have a shape and no numbers.

Triton's ops are chosen and their fake kernels run, so everything around the kernels runs as on a device; a number that
the host reads back is an error here, as no such tensor has one. Torch's backward asks for the device itself: whole
steps are of "meta" tensors, which are taken for a GPU's.
"""

import ctypes
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import pytest
import tiny
import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily

from transfusion import Transfusion
from transfusion.diffusion.schedule import NoiseSchedule
from transfusion.generation import graphs
from transfusion.generation.rows import Denoiser, Rows
from transfusion.kernels import (
    IntervalMask,
    RaggedLatents,
    denoise_step,
    gpus,
    interval_mask,
    registry,
    transfusion_attention,
    tuning,
)
from transfusion.kernels.attention import op as attention
from transfusion.sequence import Batch, Image, SpecialTokens, Text, collate
from transfusion.training import ParallelConfig, TrainConfig, Trainer, World, distribute
from transfusion.training.activations import Checkpointing

T = TypeVar("T")
GPU = torch.device("cuda:0")
_CUDA, _META = 1, 14  # c10::DeviceType
_GUARDS = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An H200 of stand-ins."""
    # a torch for CPUs has no guard of such a device, one for GPUs a guard that asks the driver: another one's serves
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    try:
        guards = (ctypes.c_void_p * 24).in_dll(library, _GUARDS)
    except ValueError:
        pytest.skip("this torch keeps its device guards elsewhere")
    own, guards[_CUDA] = guards[_CUDA], guards[_META]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    for name, answer in (
        ("is_available", True),
        ("is_bf16_supported", True),
        ("is_current_stream_capturing", False),
        ("get_device_properties", properties),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    monkeypatch.setattr(FakeTensorMode, "avoid_device_init", True)  # whatever `is_available` says now
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    for module in (registry, tuning):
        monkeypatch.setattr(module, "TRITON_INTERPRET", False)
    monkeypatch.setattr(registry, "STRICT", True)
    monkeypatch.setattr(gpus, "_KNOWN", {})
    monkeypatch.setattr(interval_mask, "is_traced", lambda: False)  # masks keep what is made of them, as on a device
    monkeypatch.setattr(graphs, "is_replayed", lambda device: False)
    try:
        with mode, warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        guards[_CUDA] = own


def on_host(function: Callable[..., T]) -> Callable[..., T]:
    """The function among real tensors."""

    def call(*arguments: object, **options: object) -> T:
        with unset_fake_temporarily():
            return function(*arguments, **options)

    return call


def model(**changes: object) -> Transfusion:
    with torch.device(GPU):
        return Transfusion(replace(tiny.CONFIG, **changes))  # type: ignore[arg-type]


@on_host
def batch(*sides: int) -> Batch:
    """A row for each side: words, an image of that height; 0 is a row of words alone."""
    words = torch.tensor([1, 7, 8, 9])
    image = {side: (Image(torch.randn(3, side, 4)),) if side else () for side in sides}
    return collate([[(Text(words), *image[side])] for side in sides], 40, 2, SpecialTokens(), torch.Generator())


@on_host
def words(*ids: int) -> Text:
    return Text(torch.tensor(ids))


def test_a_stand_in_has_no_numbers(gpu: None) -> None:
    tensor = torch.ones(3).to(GPU)
    assert tensor.device == GPU
    with pytest.raises(DataDependentOutputException):
        tensor.sum().item()


@pytest.mark.parametrize("sides", [(4, 4), (4, 8), (0, 0), (4, 0)], ids=str)
@pytest.mark.parametrize("prediction", ["v_prediction", "flow_prediction"])
def test_a_training_forward_reads_nothing_back(sides: tuple[int, ...], prediction: str, gpu: None) -> None:
    given = batch(*sides).to(GPU)
    assert isinstance(given.latents, RaggedLatents) == (len(set(sides) - {0}) > 1)
    with torch.autocast("cuda", torch.bfloat16):
        losses = model(schedule=NoiseSchedule(prediction))(given)
    for loss in (losses.total, losses.text, losses.image):
        assert loss.device == GPU and loss.shape == ()
    assert losses.total.requires_grad
    assert given.mask._derived, "the mask keeps what the layers share"


def test_so_does_one_with_the_unet(gpu: None) -> None:
    with torch.autocast("cuda", torch.bfloat16):
        assert model(codec="unet")(batch(8, 8).to(GPU)).total.device == GPU


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_every_mask_from_the_host_and_from_the_device(heads: tuple[int, int], head_dim: int, gpu: None) -> None:
    ids, spans = on_host(torch.full)((2, 300), -1), ((20, 200),)
    made = [IntervalMask.from_spans(300, spans), on_host(IntervalMask.from_ids)(ids)]
    masks = [mask.to(GPU, non_blocking=blocking) for mask in made for blocking in (False, True)]
    masks += [IntervalMask.from_spans(300, spans, device=GPU), IntervalMask.from_ids(ids.to(GPU))]
    masks += [IntervalMask.causal(300, GPU), IntervalMask.prefix_lm(300, 20, GPU), IntervalMask.full(300, 300, GPU)]
    masks += [IntervalMask.sliding_window(300, 40, GPU), IntervalMask.stack([masks[0]] * 2)]
    for mask in masks:
        q, k, v = (
            torch.randn(2, count, 300, head_dim, device=GPU, dtype=torch.bfloat16, requires_grad=True)
            for count in (heads[0], heads[1], heads[1])
        )
        out, lse = transfusion_attention(q, k, v, mask, return_lse=True)
        assert (out.device, out.shape, out.dtype) == (GPU, q.shape, q.dtype) and lse.shape == q.shape[:3]
        assert out.requires_grad and mask._derived
        assert mask.to(GPU) is mask


def test_a_generation_reads_back_only_what_it_draws(gpu: None) -> None:
    """Two prompts of unequal length, an image denoised with its unconditional twin, committed, and a token more."""
    network = model().eval()
    with torch.no_grad():
        two, logits = Rows.start(network, [(words(1, 7),), (words(1, 8, 9),)], 40)
        for _ in range(4):
            logits = two.next(torch.tensor([5, 6]))
        single, _ = Rows.start(network, [(words(1),)], 40)
        denoiser = Denoiser(two, (3, 4, 4), single.take([0, 0]))
        latents, moment = torch.randn(2, 3, 4, 4, device=GPU), torch.zeros(2, dtype=torch.int64, device=GPU)
        for _ in range(4):
            alone, (guided, twin) = denoiser(latents, moment), denoiser.both(latents, moment)
            assert alone.shape == guided.shape == twin.shape == latents.shape and alone.device == GPU
        assert two.commit(latents).shape == logits.shape == (2, tiny.CONFIG.vocab_size)


def test_a_fused_step_of_a_sampler(gpu: None) -> None:
    latents, prediction = torch.randn(2, 3, 4, 4, device=GPU), torch.randn(2, 4, 12, device=GPU)
    coefficients = torch.zeros(7, device=GPU)
    assert denoise_step(prediction, latents, coefficients, 2).shape == latents.shape


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("length", [40, 60])
def test_a_whole_step_reads_nothing_back(
    checkpointing: Checkpointing, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward, clipping, the optimizer and the average too, of tensors on "meta", which have no numbers either."""
    monkeypatch.setattr(registry, "why_not", lambda *_, **__: [])
    monkeypatch.setattr(registry.Op, "order", lambda op, device: op.cuda_order)
    monkeypatch.setattr(tuning, "table_name", lambda device: "sm_90")
    monkeypatch.setattr(tuning, "processors", lambda device: 132)
    monkeypatch.setattr(interval_mask, "is_traced", lambda: False)
    ran = []
    genuine = registry.choose
    monkeypatch.setattr(attention, "choose", lambda *call, **sizes: ran.append(genuine(*call, **sizes)) or ran[-1])
    with torch.device("meta"):
        network = Transfusion(tiny.CONFIG)
    world, parallel = World(torch.device("meta")), ParallelConfig(checkpointing=checkpointing)
    distribute(network, parallel, "float32", world)
    config = TrainConfig(steps=10, warmup_steps=0, accumulation=2, parallel=parallel)
    trainer = Trainer(network, tiny.Batches(length=length), config, tmp_path, world=world)
    batches = trainer.loader.iterate()
    for _ in range(2):
        trainer.train_step(batches)
        trainer.step += 1
    assert set(ran) == {"triton"} and trainer.losses_seen.skipped.is_meta
    with pytest.raises(RuntimeError, match="meta"):
        trainer.losses_seen.read()
