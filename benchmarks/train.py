"""Suite "train": one training step (losses, gradients, clipping, AdamW) on packed captions, images and text.

FLOPs are those of `transfusion.model.flops`; "share" is their rate over this run's rate of matrix products. Every step
gets its mask anew, as training does.
"""

import random
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers, rows
from benchmarks.attention import fresh
from benchmarks.cases import DEVICE
from benchmarks.clock import Effort, in_turn, matmul_rate, peak_memory, wall_time
from benchmarks.gate import failures
from benchmarks.models import random_model
from transfusion import Transfusion, presets
from transfusion.data.documents import caption_image_document, text_documents
from transfusion.kernels import IntervalMask, transfusion_attention
from transfusion.kernels.attention import torch_paths
from transfusion.kernels.testing import Verdict, in_a_line, judge
from transfusion.model import transformer
from transfusion.model.flops import training_flops
from transfusion.sequence import Batch, Document, SpecialTokens, collate, document_length

SUITE = "train"
PEER = peers.NAME
Attend = Callable[[Tensor, Tensor, Tensor, IntervalMask], Tensor]


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask) -> Tensor:
    return torch_paths.dense_sdpa(q, k, v, mask, q.shape[3] ** -0.5)


# baseline -> its attention, where that is not what `impl="auto"` takes
BASELINES: dict[str, Attend | None] = {
    "ours": None,
    "flex": partial(transfusion_attention, impl="flex"),
    "sdpa dense": _dense,
    "eager": partial(transfusion_attention, impl="reference"),
    PEER: None,
}


@dataclass(frozen=True)
class TrainCase:
    """A preset trained on `rows` rows of `length` tokens, with latents of `side` × `side`."""

    preset: str
    rows: int
    length: int
    side: int


CASES = {
    "cpu": {"tiny_6x160": TrainCase("tiny", 6, 160, 32), "tiny_2x1024": TrainCase("tiny", 2, 1024, 32)},
    "cuda": {"0.16b_8x4096": TrainCase("0.16b", 8, 4096, 32), "1.4b_2x4096": TrainCase("1.4b", 2, 4096, 32)},
}[DEVICE]


_BATCHES = 4  # in turn


def pairs() -> list[tuple[str, str]]:
    """(case, baseline) of the suite."""
    return [(case, baseline) for case in CASES for baseline in BASELINES]


def documents(case: TrainCase, seed: int = 0) -> list[list[Document]]:
    """Rows of documents as the paper mixes them: captioned images, and text, each row filled as far as they fit."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    config, special = presets.get(case.preset), SpecialTokens()

    def words(count: int) -> torch.Tensor:
        return torch.randint(5, config.vocab_size, (count,), generator=generator)

    def document() -> Document:
        if rng.random() < 0.3:
            return text_documents(words(rng.randint(16, min(1024, case.length // 2))), case.length, special)[0]
        latent = torch.randn(config.latent_channels, case.side, case.side, generator=generator)
        return caption_image_document(words(rng.randint(8, 40)), latent, special=special)

    result = []
    for _ in range(case.rows):
        row: list[Document] = []
        free = case.length
        while (length := document_length(candidate := document(), config.patch_size)) <= free:
            row.append(candidate)
            free -= length
        result.append(row)
    return result


def batch(case: TrainCase, seed: int = 0) -> Batch:
    """Those rows as one batch on the host."""
    config = presets.get(case.preset)
    generator = torch.Generator().manual_seed(seed)
    return collate(documents(case, seed), case.length, config.patch_size, SpecialTokens(), generator)


def run(case_name: str, baseline: str, effort: Effort) -> Iterator[rows.Row]:
    """The step's time under one baseline, after its gradients passed the check; or why it is not timed."""
    what = (SUITE, case_name, baseline, "step")
    reason = why_not(baseline)
    if reason:
        yield rows.row(*what, "skipped", reason=reason)
        return
    torch._dynamo.reset()
    work, ours = _measured(what, CASES[case_name], effort), baseline in ("ours", "eager")
    yield from rows.explained(work, what[:3], what[3:], ours)


def _measured(what: tuple[str, str, str, str], case: TrainCase, effort: Effort) -> Iterator[rows.Row]:
    baseline = what[2]
    if baseline == PEER:
        peer = peers.training_step([documents(case, seed) for seed in range(_BATCHES)], presets.get(case.preset))
        yield rows.row(*what, "ok", **_timed(*peer, effort, beside=own_step(case)))
        return
    checked = check(case, BASELINES[baseline])
    if wrong := failures(checked):
        yield rows.row(*what, "failed", reason=wrong, gate=checked)
        return
    yield rows.row(*what, "ok", gate=checked, **_ours(case, BASELINES[baseline], effort))


def why_not(baseline: str) -> str | None:
    """Why a baseline cannot run here."""
    if baseline == PEER:
        return peers.why_not()
    if baseline == "flex" and DEVICE != "cuda":
        return "FlexAttention compiles for minutes on a CPU and has no backward there"
    return None


@contextmanager
def attention_by(attend: Attend | None) -> Iterator[None]:
    """The model's attention by `attend`, all else as ever; None changes nothing."""
    originals = transformer.transfusion_attention, transformer.prepare_attention
    if attend:
        transformer.transfusion_attention = lambda q, k, v, mask, impl: attend(q, k, v, mask)  # type: ignore[assignment]
        transformer.prepare_attention = lambda *mask, **sizes: None
    try:
        yield
    finally:
        transformer.transfusion_attention, transformer.prepare_attention = originals


def _cast() -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if DEVICE == "cuda" else nullcontext()


def check(case: TrainCase, attend: Attend | None) -> dict[str, Verdict]:
    """The embedding's gradient, which the whole step has a part in, against float64; two layers and one row of it."""
    config = replace(presets.get(case.preset), layers=2)
    model = random_model(config)
    small = batch(replace(case, rows=1, length=min(case.length, 1024))).to(DEVICE)

    def gradient(
        model: Transfusion, attend: Attend | None, cast: AbstractContextManager[Any], impl: str = "auto"
    ) -> Tensor:
        again = replace(small, mask=fresh(small.mask.to("cpu")))
        with attention_by(attend), cast:
            total = model(again, impl).total
        return torch.autograd.grad(total, model.embedding.weight)[0]

    formula = BASELINES["eager"]
    actual, eager = (gradient(model, each, _cast()) for each in (attend, formula))
    return {"embedding gradient": judge(actual, eager, gradient(model.double(), formula, nullcontext(), "reference"))}


def own_step(case: TrainCase) -> Callable[[int], None]:
    """A step of our model on one of four batches in turn."""
    return _own(case)[0]


def _own(case: TrainCase) -> tuple[Callable[[int], None], Transfusion, list[Batch]]:
    model = random_model(presets.get(case.preset))
    batches = [batch(case, seed) for seed in range(_BATCHES)]
    return _step(model, lambda number: _loss(model, batches[number % len(batches)])), model, batches


def _ours(case: TrainCase, attend: Attend | None, effort: Effort) -> rows.Row:
    step, model, batches = _own(case)

    def attended(number: int) -> None:
        with attention_by(attend):
            step(number)

    beside = None if attend is None else own_step(case)
    figures = _timed(attended, model, case.rows * case.length, effort, beside)
    parts = {}
    if attend is None:
        try:
            parts["breakdown"] = breakdown(step)
        except Exception as error:  # the profiler's; the step was timed without it
            parts["breakdown_error"] = in_a_line(error)
    flops = sum(training_flops(model.config, each).total.item() for each in batches) / len(batches)
    share = flops / figures["p50"] / matmul_rate()
    return figures | {"flops": flops, "tflops": flops / figures["p50"] / 1e12, "share": share} | parts


def _loss(model: Transfusion, batch: Batch) -> torch.Tensor:
    moved = replace(batch.to(DEVICE), mask=fresh(batch.mask))
    with _cast():
        return model(moved).total


def _step(model: nn.Module, loss: Callable[[int], torch.Tensor]) -> Callable[[int], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step(number: int) -> None:
        loss(number).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _timed(
    step: Callable[[int], Any],
    model: nn.Module,
    tokens: float,
    effort: Effort,
    beside: Callable[[int], Any] | None = None,
) -> rows.Row:
    """Times and what follows from them; with our own step `beside` it, also the median of its time over ours."""
    step(0)
    with peak_memory() as peak:
        step(1)
    effort = effort._replace(seconds=10 * effort.seconds)
    if beside is None:
        times, quotient = wall_time(step, effort), None
    else:
        times, _, quotient = in_turn(step, beside, effort)
    return {
        **times._asdict(),
        "times_ours": quotient,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "tokens": tokens,
        "tokens_per_second": tokens / times.p50,
        "peak_bytes": (peak or [None])[0],
    }


_PARTS = (
    (
        "attention",
        r"attention|forward_kernel|(backward|specialised)_(query|key)_kernel|delta_kernel|combine_kernel"
        r"|(query|key)_tiles_kernel|key_extremes_kernel|flash|fmha|flex",
    ),
    ("matrix products", r"aten::(mm|addmm|bmm)$|gemm|nvjet|cutlass|xmma|linear_cross_entropy"),
    ("noise and diffusion loss", r"patchify|diffusion_loss|denoise_step|mean_of_tiles|philox"),
    ("optimizer", r"adam|_foreach|multi_tensor|norm\.Scalar|clip"),
)


def breakdown(step: Callable[[int], Any], steps: int = 3) -> dict[str, float]:
    """Seconds of a step by what they are spent on, from the profiler: of the device on CUDA, else of CPU operators."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if DEVICE == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        for number in range(steps):
            step(number)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    parts: dict[str, float] = {}
    for event in profiler.key_averages():
        spent = event.self_device_time_total if DEVICE == "cuda" else event.self_cpu_time_total
        name = next((part for part, pattern in _PARTS if re.search(pattern, event.key, re.IGNORECASE)), "other")
        parts[name] = parts.get(name, 0.0) + spent / 1e6 / steps
    return parts
