"""Text until BOI, denoise an image, EOI, text again, until EOS: whole documents, many at once.

The loop of arXiv 2408.11039, section 3.3. Rows that write text write together, rows that draw draw together, and each
stops by itself. The text after an image sees its clean latent, at timestep 0.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transfusion.data.packing import seeded
from transfusion.diffusion.sampler import Known, OnStepEnd, Predict, check_scheduler, sample, timesteps
from transfusion.generation.arguments import function, of_kind, sides
from transfusion.generation.graphs import is_replayed
from transfusion.generation.guidance import Guidance
from transfusion.generation.requests import Generation, Request, check_requests, listed, one_of_each
from transfusion.generation.rows import Denoiser, Rows, inference
from transfusion.generation.text import TextSampling, choose
from transfusion.kernels.registry import whole
from transfusion.model import Transfusion
from transfusion.sequence import Document, Image, Text, document_length, image_tokens

Stop = Callable[[Sequence[int]], bool]
OnToken = Callable[[int, Sequence[int]], Any]


@dataclass(frozen=True)
class _Plan:
    """What holds for all rows of one call."""

    model: Transfusion
    latent_shape: tuple[int, ...]
    scheduler: Any
    steps: int
    guidance: Guidance
    sampling: TextSampling
    stop: Stop | None
    max_length: int | None
    on_step_end: OnStepEnd | None
    on_token: OnToken | None
    impl: str
    progress: bool

    @property
    def image_tokens(self) -> int:
        return image_tokens(self.latent_shape, self.model.config.patch_size)


class _Row:
    """A request in progress."""

    def __init__(self, plan: _Plan, request: Request, index: int) -> None:
        self.plan, self.request, self.index = plan, request, index
        self.length = document_length(request.context, plan.model.config.patch_size)
        self.room = request.max_new_tokens
        self.wants_image = request.image_next
        self.finish = ""
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self._segments: list[Text | Image] = []
        self._run: list[int] = []  # of text, since the last image
        self.images = 0
        self.generator = seeded(request.seed, "text")

    def image_generator(self) -> torch.Generator:
        """Of the next image: the same whatever text was drawn before it."""
        return seeded(self.request.seed, "image", self.images)

    def reach(self) -> int:
        """The most tokens that the document can come to."""
        request, limit = self.request, self.plan.max_length
        most = self.length + request.max_new_tokens + request.max_images * (self.plan.image_tokens + 2)
        return most if limit is None else min(most, limit)

    def add_token(self, token: int, logprob: float) -> None:
        """Takes a drawn token in, and decides what comes next."""
        special, plan = self.plan.model.config.special, self.plan
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.room -= 1
        stops = token in plan.sampling.stop_tokens
        if token == special.boi and not stops:
            self.wants_image = self.images < self.request.max_images
            self.finish = "" if self.wants_image else "images"
            self._check_image_fits()
            return
        self._run.append(token)
        self.length += 1
        if plan.on_token is not None:
            plan.on_token(self.index, list(self._run))
        if token == special.eos:
            self.finish = "eos"
        elif stops or (plan.stop is not None and plan.stop(list(self._run))):
            self.finish = "stop"
        else:
            self._check_room()

    def add_image(self, latent: Tensor) -> None:
        """Takes a drawn image in, and decides whether text comes next."""
        self._close_run()
        self._segments.append(Image(latent))
        self.images += 1
        self.wants_image = False
        self.length += self.plan.image_tokens + 2
        if self.request.max_new_tokens:
            self._check_room()
        else:
            self.finish = "done"

    def _check_room(self) -> None:
        limit = self.plan.max_length
        if not self.room or (limit is not None and self.length >= limit):
            self.finish = "length"

    def _check_image_fits(self) -> None:
        limit = self.plan.max_length
        if self.wants_image and limit is not None and self.length + self.plan.image_tokens + 2 > limit:
            self.wants_image, self.finish = False, "length"

    def _close_run(self) -> None:
        if self._run:
            self._segments.append(Text(torch.tensor(self._run, dtype=torch.int64, device="cpu")))
            self._run = []

    def result(self) -> Generation:
        self._close_run()
        tokens, logprobs = (
            torch.tensor(self.tokens, dtype=torch.int64, device="cpu"),
            torch.tensor(self.logprobs, dtype=torch.float64, device="cpu"),
        )
        return Generation(tuple(self._segments), tokens, logprobs, self.finish)


_UNGUIDED, _GREEDY = Guidance(), TextSampling()
_Group = tuple[list[_Row], Rows]
_Following = tuple[list[_Row], Rows, Tensor]  # with the logits of what follows


def generate(
    model: Transfusion,
    requests: Sequence[Request],
    *,
    latent_shape: Sequence[int],
    scheduler: Any = None,
    steps: int = 50,
    guidance: Guidance = _UNGUIDED,
    sampling: TextSampling = _GREEDY,
    stop: Stop | None = None,
    max_length: int | None = None,
    on_step_end: OnStepEnd | None = None,
    on_token: OnToken | None = None,
    impl: str = "auto",
    progress: bool = False,
) -> list[Generation]:
    """-> what follows each request's context, in their order.

    Requests of every kind go into one call, and each depends on its own context and seed alone: in another batch it
    comes out the same up to float rounding. A finished row soon costs nothing more.

    Args:
        model: in any mode, which is kept.
        requests: documents so far, of any lengths.
        latent_shape: (C, h, w) of new images; those in the contexts may have others, with the U-Net codec all the same
            one.
        scheduler: of `make_scheduler`, or any other of diffusers that fits the model's schedule; not changed. Needed
            where images may come.
        steps: of denoising. The paper takes 250 of 1000.
        guidance: of images.
        sampling: of text.
        stop: told the text tokens since the last image after each new one; True ends the document.
        max_length: tokens of the longest document that the model can read; documents end there.
        on_step_end: (step from 0, timestep, latents (I, C, h, w)) -> the latents to continue with, after every step;
            what it gives is taken without its gradient, in float32.
        on_token: told (index of the request, the text tokens since its last image) after each new one of them. What a
            function that is told something raises ends the call.
        impl: of the kernels.
        progress: show a bar for each round of denoising.

    Raises:
        ValueError, TypeError: an argument that does not fit, named with the fix.
        FloatingPointError: logits or a prediction that are not finite.
    """
    shape, requests = sides(latent_shape), listed(requests)
    _check_kinds(guidance, sampling, max_length, stop=stop, on_step_end=on_step_end, on_token=on_token)
    told = on_step_end, on_token
    plan = _Plan(model, shape, scheduler, steps, guidance, sampling, stop, max_length, *told, impl, progress)
    check_call(model, requests, shape, scheduler, steps, max_length)
    _check_stop_tokens(model, sampling)
    rows = [_Row(plan, request, index) for index, request in enumerate(requests)]
    with inference(model):
        state, logits = Rows.start(model, [r.context for r in requests], max(row.reach() for row in rows), impl)
        drawing = _those(rows, state, [i for i, row in enumerate(rows) if row.wants_image])
        writing = [i for i, row in enumerate(rows) if not row.wants_image]
        text = [(*group, logits[writing]) for group in _those(rows, state, writing)]
        del state  # whoever continues has a cache, and each that is done with is freed at once: see `KVCache`
        while text or drawing:
            if text:
                drawing += _write(plan, text)
            text = _draw(plan, drawing) if drawing else []
    return [row.result() for row in rows]


def check_call(
    model: Transfusion,
    requests: Sequence[Request],
    latent_shape: Sequence[int],
    scheduler: Any,
    steps: int,
    max_length: int | None,
) -> None:
    """Raises `ValueError` or `TypeError` for what `generate` cannot be asked, before any work is done."""
    check_requests(model, requests, latent_shape, max_length)
    if any(request.max_images for request in requests):
        check_scheduler(scheduler, model.config.schedule)
        timesteps(copy.deepcopy(scheduler), model.config.schedule, steps)  # raises where steps do not fit


def _check_kinds(guidance: Any, sampling: Any, max_length: Any, **functions: Any) -> None:
    of_kind("guidance", guidance, Guidance)
    of_kind("sampling", sampling, TextSampling)
    for name, given in functions.items():
        function(name, given)
    if max_length is not None:
        whole("max_length", max_length)


def _check_stop_tokens(model: Transfusion, sampling: TextSampling) -> None:
    size = model.config.vocab_size
    if any(token >= size for token in sampling.stop_tokens):
        raise ValueError(f"stop_tokens={sampling.stop_tokens} must be within the vocabulary of {size}")


def _those(rows: Sequence[_Row], state: Rows, chosen: Sequence[int]) -> list[_Group]:
    """The chosen rows as a group of their own; no group where there are none, and no copy where all are chosen."""
    if not chosen:
        return []
    return [([rows[i] for i in chosen], state if len(chosen) == len(rows) else state.take(chosen))]


def _write(plan: _Plan, text: list[_Following]) -> list[_Group]:
    """Takes the last group of `text`, and draws text for every row of it until each is finished or wants an image ->
    those that do, in groups.

    Where a step is a graph, of one number of rows, those that are done rest until half are, and leave together.
    """
    drawing: list[_Group] = []
    rows, state, logits = text.pop()
    going = list(range(len(rows)))
    while True:
        theirs = logits if len(going) == len(rows) else logits[going]  # who rests draws nothing
        tokens, logprobs = choose(theirs, plan.sampling, [rows[i].generator for i in going])
        for i, token, logprob in zip(going, tokens, logprobs, strict=True):
            rows[i].add_token(token, logprob)
        drawing += _those(rows, state, [i for i in going if rows[i].wants_image])
        going = [i for i in going if not (rows[i].finish or rows[i].wants_image)]
        if not going:
            return drawing
        if not is_replayed(state.device) or 2 * len(going) <= len(rows):
            ((rows, state),) = _those(rows, state, going)
            going = list(range(len(rows)))
        logits = state.next(torch.tensor([row.tokens[-1] for row in rows], device="cpu"), going)


def _draw(plan: _Plan, drawing: list[_Group]) -> list[_Following]:
    """Takes all groups of `drawing`, and draws an image for every row -> those that continue: one group."""
    rows, state = [row for group, _ in drawing for row in group], Rows.stack([each for _, each in drawing])
    drawing.clear()
    state.next(torch.tensor([plan.model.config.special.boi], device="cpu").expand(len(rows)))
    generators = [row.image_generator() for row in rows]
    drawn = [torch.randn(plan.latent_shape, generator=each, dtype=torch.float32, device="cpu") for each in generators]
    latents = sample(
        _predictor(plan, state),
        torch.stack(drawn).to(state.device),
        schedule=plan.model.config.schedule,
        scheduler=plan.scheduler,
        steps=plan.steps,
        generators=generators,
        known=_known(plan, rows, state.device),
        on_step_end=plan.on_step_end,
        progress=plan.progress,
    )
    for row, latent in zip(rows, latents.cpu(), strict=True):
        row.add_image(latent)
    going = [i for i, row in enumerate(rows) if not row.finish]
    return [(group, state, state.commit(latents[going])) for group, state in _those(rows, state, going)]


def _predictor(plan: _Plan, state: Rows) -> Predict:
    """(latents, timestep) -> the guided prediction; rows and their unconditional twins go through in one batch."""
    guidance, special = plan.guidance, plan.model.config.special
    if guidance.off:
        return Denoiser(state, plan.latent_shape)
    document = (Text(torch.tensor([special.bos], device="cpu")),)
    single, _ = Rows.start(plan.model, [document], plan.image_tokens + 2, plan.impl)
    single.next(torch.tensor([special.boi], device="cpu"))
    denoiser = Denoiser(state, plan.latent_shape, single.take([0] * len(state)))
    schedule = plan.model.config.schedule
    # decided here, on the host: to read a timestep back from the device would wait for all work before it
    moments = timesteps(copy.deepcopy(plan.scheduler), schedule, plan.steps).double()  # in float32 800 / 1000 > 0.8
    guided = iter([guidance.active(time) for time in (moments / schedule.timestep_range).clamp(0, 1).tolist()])

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:  # `sample` asks once at each of the timesteps
        return guidance(*denoiser.both(latents, timestep)) if next(guided) else denoiser(latents, timestep)

    return predict


def _known(plan: _Plan, rows: Sequence[_Row], device: torch.device) -> Known | None:
    """What is given of the images that are drawn together: nothing of those of other rows."""
    given = [row.request.known if not row.images else None for row in rows]
    if not any(given):
        return None
    everything = torch.ones(1, *plan.latent_shape[1:], dtype=torch.bool, device="cpu")
    nothing = Known(torch.zeros(plan.latent_shape, device="cpu"), everything)
    latents, unknown = zip(*[known or nothing for known in given], strict=True)
    return Known(torch.stack(latents).float().to(device), torch.stack(unknown).to(device))


def denoise(
    model: Transfusion,
    contexts: Sequence[Document],
    latent_shape: Sequence[int],
    *,
    seeds: Sequence[int],
    **options: Any,
) -> Tensor:
    """One new image after each context -> latents (I, C, h, w) float32 on the CPU. The rest is as in `generate`."""
    contexts, seeds = one_of_each("seeds", seeds, contexts)
    pairs = zip(contexts, seeds, strict=True)
    requests = [Request(context, max_images=1, image_next=True, seed=seed) for context, seed in pairs]
    return torch.stack([each.images[0] for each in generate(model, requests, latent_shape=latent_shape, **options)])
