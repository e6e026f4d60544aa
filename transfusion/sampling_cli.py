"""transfusion sample: images, captions, edits, continuations and stories from a run or a saved pipeline, as files."""

import io
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transfusion.files import write_whole

if TYPE_CHECKING:
    from transfusion.generation import TransfusionPipeline
    from transfusion.generation.inputs import PipelineOutput

DEFAULT_MODEL = Path("emoji-32")  # this very object: a name that the user gives is first looked for among folders


@dataclass(frozen=True)
class SampleOptions:
    """Images from captions (--prompt), edits of an image (--edit with --prompt), captions of images (--image),
    continuations of texts (--text), texts with images in them (--story): all of them in one batch.

    Args:
        run: folder of a run; of one that has not finished, the averaged weights of its last checkpoint are used.
        model: a saved pipeline in place of a run: its folder, or the name of one that comes with the package. Without
            a run or a model, emoji-32, which does.
        prompt: captions to draw, or what to change in --edit.
        edit: an image to change as each prompt says; it is cropped around its centre to the shape that is drawn.
        mask: with --edit: a picture of the same size, white where the image is to be repainted; the rest is kept. It is
            cropped like the image.
        image: files to caption.
        text: texts to continue.
        story: texts to continue with text and images.
        height: of every image, in pixels; None is the model's usual side.
        width: of every image, in pixels; None is the model's usual side.
        out: folder for PNGs, sheet.html and settings.json, made if need be. PNGs of an earlier call stay, except those
            of the same name, and are reported; sheet and settings are of this call alone.
        steps: denoising steps of an image; None is the scheduler's usual number.
        guidance_scale: classifier-free guidance scale; 1 is none.
        guidance_interval: times, 0 the clean image and 1 pure noise, between which guidance is on.
        guidance_rescale: how much of a guided prediction's deviation is brought back, within [0, 1].
        scheduler: "fast", "paper" (250 steps of DDPM), "ddim", "ddpm", "dpmsolver", "euler" or "scm".
        temperature: of text; 0 is greedy.
        top_k: sample text from the k likeliest tokens.
        top_p: sample text from the likeliest tokens that hold so much of the probability.
        min_p: sample text from tokens so many times as likely as the likeliest.
        stop: strings at which a text ends.
        max_new_tokens: of text, in each row.
        max_images: of a story.
        seed: the same seed gives the same samples.
        device: "auto" is CUDA where there is one.
    """

    run: Path | None = None
    model: Path | None = None
    prompt: tuple[str, ...] = ()
    edit: Path | None = None
    mask: Path | None = None
    image: tuple[Path, ...] = ()
    text: tuple[str, ...] = ()
    story: tuple[str, ...] = ()
    height: int | None = None
    width: int | None = None
    out: Path = Path("samples")
    steps: int | None = None
    guidance_scale: float = 3.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    scheduler: str = "fast"
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 64
    max_images: int = 4
    seed: int = 0
    device: str = "auto"


def main(arguments: Sequence[str]) -> int:
    """`transfusion sample --run DIR --prompt TEXT ...`."""
    import tyro

    options = tyro.cli(SampleOptions, args=list(arguments), prog="transfusion sample")
    if options.edit is not None and not options.prompt:
        raise ValueError("--edit needs --prompt: what is to change")
    if not (options.prompt or options.image or options.text or options.story):
        raise ValueError("nothing to sample: give --prompt, --image, --text or --story")
    if options.mask is not None and options.edit is None:
        raise ValueError("--mask needs --edit: the image that it is a part of")
    if options.max_new_tokens < 1 and (options.image or options.text or options.story):
        raise ValueError(f"--max-new-tokens {options.max_new_tokens} leaves nothing to write; give at least 1")
    if options.max_images < 0:
        raise ValueError(f"--max-images {options.max_images}: a story cannot have fewer than 0")
    options = with_model(options)
    _check_folder(options.out)
    earlier = _numbered(options.out)
    rows = write_samples(options, open_pipeline(options))
    _tell_of(options.out, earlier, rows)
    print(json.dumps(rows, indent=2, ensure_ascii=False))
    print(f"see {options.out}/sheet.html")
    return 0


def _check_folder(out: Path) -> None:
    """Raises `ValueError` if `out` cannot be made or written to, before any work is done; leaves no folder behind."""
    there = next(path for path in (out, *out.parents) if path.exists())
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"--out {out}: no folder that can be written to ({reason}); give another one") from error
    finally:
        for path in takewhile(lambda path: path != there, (out, *out.parents)):
            with suppress(OSError):
                path.rmdir()


def _numbered(out: Path) -> list[str]:
    """The names in `out` of images that a call has written, or could have."""
    return sorted(path.name for path in out.glob("*.png") if re.match(r"\d{3,}[-.]", path.name))


def _tell_of(out: Path, earlier: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Prints one line if `out` already had images: how many this call has replaced, and which are left."""
    new = {name for row in rows for name in (*row.get("files", ()), *row.get("document", ()))}
    left = [name for name in earlier if name not in new]
    if earlier:
        shown = f": {', '.join(left[:3])}{', ...' if len(left) > 3 else ''}" if left else ""
        print(
            f"{out} had images of an earlier call: {len(earlier) - len(left)} replaced, {len(left)} left, which are "
            f"not in the sheet{shown}",
            file=sys.stderr,
        )


def with_model(options: SampleOptions) -> SampleOptions:
    """The options, naming `DEFAULT_MODEL` where they name nothing. Raises `ValueError` where they name two."""
    if options.run is not None and options.model is not None:
        raise ValueError("give one of --run (a folder that `train` made) and --model (a saved pipeline)")
    if options.run is not None or options.model is not None:
        return options
    print(f"neither --run nor --model: {DEFAULT_MODEL}, which comes with the package", file=sys.stderr)
    return replace(options, model=DEFAULT_MODEL)


def open_pipeline(options: SampleOptions) -> "TransfusionPipeline":
    """What `run` or `model` names, on the device; on a CPU a model's weights are float32. Raises `FileNotFoundError` or
    `ValueError` if it is neither.
    """
    import torch

    from transfusion import recipes
    from transfusion.cli import pick_device
    from transfusion.generation import TransfusionPipeline
    from transfusion.run import Run

    device = pick_device(options.device)
    if options.model is not None:
        is_default = options.model is DEFAULT_MODEL
        source = recipes.trained()[str(DEFAULT_MODEL)] if is_default else options.model
        return TransfusionPipeline.from_pretrained(source, device, torch.float32 if device == "cpu" else None)
    assert options.run is not None
    run = Run.open(options.run, device)
    return run.pipeline(run.model())


@dataclass(frozen=True)
class _Job:
    """One row of the batch: its kind and its inputs."""

    kind: str
    prompt: str | None
    image: Path | None
    output: str


def _jobs(options: SampleOptions) -> list[_Job]:
    drawing = "image" if options.edit is None else "inpainting" if options.mask else "edit"
    return [
        *(_Job(drawing, prompt, options.edit, "image") for prompt in options.prompt),
        *(_Job("caption", None, path, "text") for path in options.image),
        *(_Job("continuation", text, None, "text") for text in options.text),
        *(_Job("story", text, None, "both") for text in options.story),
    ]


def write_samples(options: SampleOptions, pipeline: "TransfusionPipeline") -> list[dict[str, Any]]:
    """Samples everything in one batch; writes NNN-prompt.png for each image, sheet.html and settings.json.

    -> the rows, as settings.json has them beside the options: each with its kind, inputs and seed, and with the files
    of its images, its text or, for a story, a document of texts and files in turn.
    """
    from transfusion.generation.inputs import PipelineOutput

    jobs = _jobs(options)
    done: PipelineOutput = pipeline(
        [job.prompt for job in jobs],
        image=[job.image for job in jobs],
        mask_image=[options.mask if job.kind == "inpainting" else None for job in jobs],
        output=[job.output for job in jobs],
        height=options.height,
        width=options.width,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        guidance_interval=options.guidance_interval,
        guidance_rescale=options.guidance_rescale,
        scheduler=options.scheduler,
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
        max_images=options.max_images,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        stop=options.stop,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    names = _names(jobs, done)
    for name, image in zip(names, done.images, strict=True):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        write_whole(options.out / name, buffer.getvalue())
    rows = [
        _row(job, options.seed + index, [names[part] if isinstance(part, int) else part for part in document])
        for index, (job, document) in enumerate(zip(jobs, done.documents, strict=True))
    ]
    settings = {"options": {name: str(value) for name, value in vars(options).items()}, "rows": rows}
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    write_whole(options.out / "settings.json", text)
    _write_sheet(options, jobs, done, settings)
    return rows


def _names(jobs: Sequence[_Job], done: "PipelineOutput") -> list[str]:
    """NNN-prompt.png for each image: its number, and the letters and digits, in any script, of its prompt."""
    owners = [
        job for job, document in zip(jobs, done.documents, strict=True) for part in document if isinstance(part, int)
    ]
    words = [re.sub(r"[\W_]+", "-", job.prompt or "").lower()[:40].strip("-") for job in owners]
    return ["-".join(filter(None, [f"{number:03d}", word])) + ".png" for number, word in enumerate(words)]


def _row(job: _Job, seed: int, document: list[str]) -> dict[str, Any]:
    """What settings.json says about a row; in `document` each image is named by its file."""
    given = {"prompt": job.prompt, "image": None if job.image is None else str(job.image)}
    row: dict[str, Any] = {"kind": job.kind, **{name: value for name, value in given.items() if value is not None}}
    row["seed"] = seed
    if job.output == "both":
        return row | {"document": document}
    if job.output == "image":
        return row | {"files": document}
    text = "".join(document)
    return row | {"text": text.strip() if job.kind == "caption" else text}


def _write_sheet(
    options: SampleOptions, jobs: Sequence[_Job], done: "PipelineOutput", settings: dict[str, Any]
) -> None:
    from transfusion.data.sources import open_rgb
    from transfusion.generation.sheet import Card, write_sheet

    cards = []
    for index, (job, document) in enumerate(zip(jobs, done.documents, strict=True)):
        given = [] if job.image is None else [open_rgb(job.image, str(job.image))]
        result = [done.images[part] if isinstance(part, int) else part for part in document]
        cards.append(Card(job.prompt or "", given, result, f"{job.kind} · seed {options.seed + index}"))
    write_sheet(options.out / "sheet.html", f"{len(jobs)} samples", cards, settings)
