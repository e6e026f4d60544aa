"""Suite "generation": what sampling costs beside another way to the same samples, the two in turn in one process.

Cached denoising beside recomputing the whole sequence, guidance in one forward beside two, decoding beside Hugging
Face's `generate` on the same weights, drawing beside transfusion-pytorch of equal size and as many evaluations.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import peers, rows
from benchmarks.cases import DEVICE
from benchmarks.clock import Effort, in_turn
from benchmarks.denoise import why_not as no_scheduler
from benchmarks.gate import failures
from transfusion import ModelConfig, Transfusion
from transfusion.diffusion.schedule import NoiseSchedule
from transfusion.kernels.testing import judge
from transfusion.sequence import Image, SpecialTokens, Text

SUITE = "generation"

_PREFIX, _SHAPE = 1024, (8, 16, 16)  # 64 image tokens after 1024 of text
_STEPS = 20  # of one image, so many steps is the prefix read once for
_VOCAB = 1024


class Sizes(NamedTuple):
    """What a machine is asked to sample from."""

    dim: int
    layers: int
    heads: int
    dtype: torch.dtype


_SIZES = {"cpu": Sizes(256, 4, 4, torch.float32), "cuda": Sizes(1024, 24, 16, torch.bfloat16)}


class Pair(NamedTuple):
    """Two ways to the same result, what is wrong with ours in words, and how many of which `unit` a call makes."""

    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    wrong: Callable[[], str]
    count: int
    unit: str


@dataclass(frozen=True)
class Case:
    """A pair, what it stands beside, and why that cannot run here."""

    baseline: str
    make: Callable[[], Pair]
    why_not: Callable[[], str | None] = lambda: None


def pairs() -> list[tuple[str, str]]:
    """(case, baseline) of the suite."""
    return [(name, case.baseline) for name, case in CASES.items()]


def run(name: str, baseline: str, effort: Effort) -> Iterator[rows.Row]:
    """Both times, after ours passed its check: a row for each, theirs with the median quotient."""
    if reason := CASES[name].why_not():
        yield rows.row(SUITE, name, baseline, "call", "skipped", reason=reason)
        return
    # an error of either ends the pair, and one of ours must not pass for a library's
    yield from rows.explained(_rows(name, baseline, effort), (SUITE, name, baseline), ("call",), ours=True)


def _rows(name: str, baseline: str, effort: Effort) -> Iterator[rows.Row]:
    pair = CASES[name].make()
    with torch.inference_mode():
        if wrong := pair.wrong():
            yield rows.row(SUITE, name, "ours", "call", "failed", reason=wrong)
            return
        theirs, ours, quotient = in_turn(
            lambda _: pair.theirs(), lambda _: pair.ours(), effort._replace(seconds=20 * effort.seconds)
        )
    for who, times, values in (("ours", ours, {}), (baseline, theirs, {"times_ours": quotient})):
        figures = {"unit": pair.unit, "per_second": pair.count / times.p50, **times._asdict(), **values}
        yield rows.row(SUITE, name, who, "call", "ok", **figures)


def network(prediction: str = "v_prediction") -> Transfusion:
    """A model that a CPU evaluates in tens of milliseconds; on a GPU the paper's 0.37b, of a smaller one launches alone
    would be timed."""
    torch.manual_seed(0)
    sizes = _SIZES[DEVICE]
    schedule = NoiseSchedule(prediction)  # type: ignore[arg-type]
    config = ModelConfig(dim=sizes.dim, layers=sizes.layers, heads=sizes.heads, vocab_size=_VOCAB, schedule=schedule)
    return Transfusion(config).to(DEVICE, sizes.dtype).eval()


@contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """The same numbers, for which every narrower format's are float64's too; afterwards as they were."""
    dtype = next(model.parameters()).dtype
    model.double()
    yield
    model.to(dtype)


def prompt(tokens: int) -> Text:
    """BOS and random tokens, the same at every call."""
    ids = torch.randint(5, _VOCAB, (tokens,), generator=torch.Generator().manual_seed(0))
    ids[0] = 1
    return Text(ids)


def cached_denoising() -> Pair:
    """The last prediction of so many steps; the timestep changes no cost, and all are 0, as `full_hidden` has them."""
    from transfusion.generation.rows import Denoiser, Rows, full_hidden

    model, noise = network(), torch.randn(_SHAPE)
    text, patch = prompt(_PREFIX), model.config.patch_size

    def recomputed(steps: int = _STEPS, impl: str = "auto") -> Tensor:
        for _ in range(steps):
            hidden, _ = full_hidden(model, [(text, Image(noise))], impl)
            result = model.decode_images(hidden[:, _PREFIX + 1 : _PREFIX + 65], None)
        return result

    def cached(steps: int = _STEPS) -> Tensor:
        read, _ = Rows.start(model, [(text,)], _PREFIX + 66)
        read.next(torch.tensor([model.config.special.boi]))
        denoiser, moment = Denoiser(read, _SHAPE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
        for _ in range(steps):
            result = denoiser(noise[None].to(DEVICE), moment)
        return result

    def wrong() -> str:
        as_tokens = torch.nn.functional.unfold(cached(1), patch, stride=patch).unflatten(1, (-1, patch**2))
        ours, eager = as_tokens.permute(0, 3, 2, 1).flatten(2), recomputed(1)  # i (c p q) n -> i n (p q c)
        with in_float64(model):
            gold = recomputed(1, "reference")
        return failures({"prediction": judge(ours.to(eager.dtype), eager, gold)})

    return Pair(cached, recomputed, wrong, _STEPS, "steps")


def guidance() -> Pair:
    """Both branches of one image in one batch, beside one after the other."""
    from transfusion.generation.rows import Denoiser, Rows

    noise = torch.randn(1, *_SHAPE, device=DEVICE)
    moment = torch.full((1,), 500, device=DEVICE)

    def branches(model: Transfusion, impl: str = "auto") -> tuple[Callable[[], Any], Callable[[], Any]]:
        read, twins = (Rows.start(model, [(prompt(count),)], count + 66, impl)[0] for count in (64, 1))
        for each in (read, twins):
            each.next(torch.tensor([model.config.special.boi]))
        together, alone, twin = Denoiser(read, _SHAPE, twins), Denoiser(read, _SHAPE), Denoiser(twins, _SHAPE)
        latents = noise.to(model.head.weight.dtype)
        return (lambda: together.both(latents, moment)), lambda: (alone(latents, moment).clone(), twin(latents, moment))

    model, exact = network(), network().double()
    with torch.inference_mode():
        (ours, theirs), (_, gold) = branches(model), branches(exact, "reference")

    def wrong() -> str:
        results = (torch.cat(list(each())) for each in (ours, theirs, gold))
        return failures({"predictions": judge(*results)})

    return Pair(ours, theirs, wrong, 1, "steps")


def decoding(batch: int) -> Pair:
    """64 greedy tokens after 32."""
    import transformers

    from transfusion.generation import Generation, Request, generate

    torch.manual_seed(0)
    dim, layers, heads, dtype = _SIZES[DEVICE]
    special = SpecialTokens()
    sizes = {"hidden_size": dim, "intermediate_size": 3 * dim, "num_hidden_layers": layers, "vocab_size": _VOCAB}
    ends = {"eos_token_id": special.eos, "bos_token_id": special.bos}
    config = transformers.LlamaConfig(num_attention_heads=heads, num_key_value_heads=heads // 2, **sizes, **ends)
    llama = transformers.LlamaForCausalLM(config).to(DEVICE, dtype).eval()
    with torch.no_grad():
        # EOS and BOI, at which a row would end, are never the likeliest
        llama.lm_head.weight[: 1 + max(astuple(special))] = 0
    model = Transfusion.from_llama(llama, special=special).to(DEVICE, dtype).eval()
    count, text = 64, prompt(32)
    requests = [Request((text,), max_new_tokens=count) for _ in range(batch)]
    ids = text.token_ids.expand(batch, -1).to(DEVICE)

    def ours() -> list[Generation]:
        return generate(model, requests, latent_shape=_SHAPE)

    def theirs() -> Tensor:
        options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        done: Tensor = llama.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return done

    def of_one_pass(documents: Tensor) -> tuple[Tensor, Tensor]:
        """Llama's log-probabilities of the tokens after the prompt, and of the likeliest in their places."""
        likely = llama(documents).logits[:, 31:-1].double().log_softmax(-1)
        return likely.gather(2, documents[:, 32:, None])[..., 0], likely.amax(-1)

    def wrong() -> str:
        done = ours()
        if {len(each.token_ids) for each in done} | {theirs().shape[1] - 32} != {count}:
            return f"a row ended before its {count} tokens"
        documents = torch.cat([ids, torch.stack([each.token_ids for each in done]).to(ids)], dim=1)
        logprobs = torch.stack([each.logprobs for each in done]).to(DEVICE, torch.float32)
        eager = of_one_pass(documents)
        with in_float64(llama):
            gold = of_one_pass(documents)
        # in 16 bits either of two tokens may be drawn, that are as likely up to rounding
        names = ("log-probabilities", "log-probabilities of the likeliest")
        return failures({name: judge(logprobs, e, g) for name, e, g in zip(names, eager, gold, strict=True)})

    return Pair(ours, theirs, wrong, batch * count, "tokens")


def drawing() -> Pair:
    """Four guided images of 64 tokens by 20 evaluations."""
    from transfusion.diffusion.sampler import make_scheduler
    from transfusion.generation import Guidance, denoise

    model, batch = network("flow_prediction"), 4
    captions = [prompt(8 + index) for index in range(batch)]
    _, peer, _ = peers.training_step([[[(captions[0], Image(torch.zeros(_SHAPE)))]]], model.config)
    peer.eval()

    def ours(impl: str = "auto") -> Tensor:
        options = {"scheduler": make_scheduler(model.config.schedule), "steps": _STEPS, "guidance": Guidance(3.0)}
        return denoise(model, [(caption,) for caption in captions], _SHAPE, seeds=range(batch), impl=impl, **options)

    def theirs() -> list[Any]:
        # its midpoint rule asks the network twice in each of the intervals between `modality_steps` times
        options = {"max_length": 1, "modality_steps": _STEPS // 2 + 1, "cfg_scale": 3.0}
        prompts = [caption.token_ids.to(DEVICE) for caption in captions]
        with peers.quiet(), torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            done: list[Any] = peer.sample_many(prompts, force_modality_at_start=(0, (8, 8)), **options)
        return done

    def wrong() -> str:
        if len(theirs()) != batch:
            return f"{peers.NAME} draws {len(theirs())} images of {batch}"
        drawn, eager = ours(), ours("reference")
        with in_float64(model):
            gold = ours("reference")
        return failures({"images": judge(drawn, eager, gold)})

    return Pair(ours, theirs, wrong, batch, "images")


def _no_llama() -> str | None:
    found = importlib.util.find_spec("transformers")
    return None if found else "transformers is not installed (pip install transformers)"


CASES = {
    "denoise_after_1k_tokens": Case("recomputed", cached_denoising),
    "guidance_batch_1": Case("two passes", guidance),
    "decode_batch_1": Case("transformers", partial(decoding, 1), _no_llama),
    "decode_batch_8": Case("transformers", partial(decoding, 8), _no_llama),
    "draw_4_images": Case(peers.NAME, drawing, lambda: peers.why_not() or no_scheduler()),
}
