"""Strings and pictures in and out: a model with its tokenizer and autoencoder around it, in one folder.

pipe = TransfusionPipeline.from_pretrained(path)
pipe(prompt="a red bicycle").images[0]                          text to image
pipe(image=picture).text[0]                                     a caption
pipe(prompt="once upon a time", output="text").text[0]          a continuation
pipe(prompt="make it blue", image=picture).images[0]            editing
pipe(prompt="a hat", image=picture, mask_image=mask).images[0]  inpainting
pipe(prompt="a story", output="both").documents[0]              text and images in turn
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from transfusion import config as configs
from transfusion.data import Autoencoder, DiffusersAutoencoder, PixelAutoencoder, Tokenizer
from transfusion.data.transforms import check_image_size
from transfusion.diffusion.sampler import Known, OnStepEnd, can_clip, default_steps, make_scheduler
from transfusion.generation.arguments import function, of_kind, sides
from transfusion.generation.guidance import Guidance
from transfusion.generation.inputs import PipelineOutput, Row, StopStrings, rows_of, seeds_of
from transfusion.generation.interleaved import OnToken, check_call, generate
from transfusion.generation.media import check_output_type, from_pixels, to_pixels, to_unknown
from transfusion.generation.requests import Generation, Request, check_latent_shape
from transfusion.generation.score import score
from transfusion.generation.text import TextSampling
from transfusion.kernels.registry import whole
from transfusion.model import Transfusion
from transfusion.model.pretrained import INDEX, WEIGHTS, local_folder
from transfusion.sequence import Image, Text, document_length

CONFIG, TOKENIZER, VAE = "pipeline.toml", "tokenizer.json", "vae"
Callback = Callable[["TransfusionPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass(frozen=True)
class PipelineConfig:
    """The content of the folder's pipeline.toml.

    Args:
        latent_shape: (C, h, w) of the images that the model was trained on; of several shapes, the nearest to square.
        autoencoder: "pixels", or "vae" for the folder vae/ beside it.
        max_length: tokens of the longest document that the model was trained on; None is no limit.
    """

    latent_shape: tuple[int, int, int]
    autoencoder: str = "pixels"
    max_length: int | None = None


class TransfusionPipeline:
    """Images from captions, captions of images, edits, continuations, and documents of both, in one call.

    latent_shape: (C, h, w) of the images that the model was trained on, the usual size of those it draws. max_length:
    tokens of its longest documents.

    Args of a call:
        prompt: texts, or None for rows without one.
        image: for each row a PIL image, a path, a tensor (3, H, W) in [0, 1], or None. It comes before the prompt. All
            but a tensor is cropped to its largest centred part of the shape of `height` and `width`, and resized.
        mask_image: inpainting: white where each row's image is to be painted anew; the rest of it stays. Of the size of
            the image, with which it is cropped; or a tensor (H, W) over what is left of it then.
        output: "image", "text" or "both", of all rows or of each; by default an image for a row with a prompt, and
            text, a caption, for one without.
        height, width: in pixels, of every image that is drawn or given, in all rows; None is the model's usual side.
            Multiples of patch_size times the autoencoder's downscale, best of a size that the model was trained on.
        num_inference_steps: of denoising; None is the scheduler's usual number.
        guidance_scale, guidance_interval, guidance_rescale: as in `Guidance`.
        scheduler: "fast", "paper", a name that `make_scheduler` knows, or a diffusers scheduler of the model's path.
        seed: of row 0, the rows after it counting on; or one for each row. Whole numbers of 64 bits.
        generator: seeds are drawn from it instead; or from one for each row.
        max_new_tokens, max_images: at most so many in a row, where text, or both, are wanted.
        temperature, top_k, top_p, min_p: as in `TextSampling`; temperature 0 is greedy.
        stop: strings at which a row ends; the text ends before them.
        output_type: "pil", "pt" or "latent".
        callback_on_step_end: diffusers': (pipeline, step, timestep, {"latents": ...}) -> a dict, whose "latents"
            replace the current ones, or None.
        callback_on_text: told (row, its text since its last image) after each new token. What either callback raises
            ends the call.
        progress: show a bar while denoising; None shows it on a terminal.
    """

    def __init__(
        self,
        model: Transfusion,
        tokenizer: Tokenizer,
        autoencoder: Autoencoder,
        latent_shape: tuple[int, int, int],
        max_length: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.autoencoder = model, tokenizer, autoencoder
        check_latent_shape(model, shape := sides(latent_shape))
        channels, height, width = shape
        self.latent_shape, self.max_length = (channels, height, width), max_length

    # ---------------------------------------------------------------- the folder

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the folder `path`: the model's files, tokenizer.json, vae/ where there is one, and pipeline.toml.

        Raises `TypeError` for an autoencoder of a kind that no folder holds, before anything is written.
        """
        if type(self.autoencoder) not in (PixelAutoencoder, DiffusersAutoencoder):
            raise TypeError(
                f"an autoencoder of type {type(self.autoencoder).__name__} cannot be saved, only PixelAutoencoder and "
                "DiffusersAutoencoder; save the model and the tokenizer by themselves"
            )
        folder = Path(path)
        (folder / CONFIG).unlink(missing_ok=True)  # of what was here: a mixture of two would pass for one
        self.model.save_pretrained(folder)
        self.tokenizer.save(folder / TOKENIZER)
        kind = "pixels"
        if isinstance(self.autoencoder, DiffusersAutoencoder):
            kind = VAE
            self.autoencoder.save_pretrained(folder / VAE)
        # last: a folder that has it is whole
        configs.save(PipelineConfig(self.latent_shape, kind, self.max_length), folder / CONFIG)

    @staticmethod
    def from_pretrained(
        path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> "TransfusionPipeline":
        """The pipeline in the folder `path`, the packaged one of that name, or OWNER/NAME on the hub.

        dtype: of the model's weights; None keeps the file's, except that float16 becomes float32 on a CPU. Raises
        `FileNotFoundError` or `ValueError` naming the file at fault.
        """
        folder = local_folder(path)
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"{folder} is no saved pipeline: it has no {CONFIG}{_instead(folder)}")
        config = configs.load(PipelineConfig, folder / CONFIG)
        if config.autoencoder not in ("pixels", VAE):
            raise ValueError(f"{folder / CONFIG}: autoencoder={config.autoencoder!r} must be 'pixels' or {VAE!r}")
        in_pixels = config.autoencoder == "pixels"
        if not (in_pixels or (folder / VAE).is_dir()):
            raise FileNotFoundError(f"{folder} has no {VAE}/, of which its {CONFIG} speaks")
        autoencoder = PixelAutoencoder() if in_pixels else DiffusersAutoencoder(folder / VAE, device)
        model, tokenizer = Transfusion.from_pretrained(folder, device, dtype), Tokenizer.load(folder / TOKENIZER)
        if tokenizer.special != model.config.special:
            raise ValueError(
                f"{folder}: the tokenizer's special tokens are {tokenizer.special}, the model's {model.config.special}"
            )
        return TransfusionPipeline(model.eval(), tokenizer, autoencoder, config.latent_shape, config.max_length)

    # ---------------------------------------------------------------- the call

    def __call__(
        self,
        prompt: str | Sequence[str | None] | None = None,
        *,
        image: Any = None,
        mask_image: Any = None,
        output: str | Sequence[str] | None = None,
        height: SupportsIndex | None = None,
        width: SupportsIndex | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 3.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        scheduler: str | Any = "fast",
        seed: SupportsIndex | Sequence[SupportsIndex] = 0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        max_new_tokens: int = 64,
        max_images: int = 4,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        stop: str | Sequence[str] = (),
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        callback_on_text: Callable[[int, str], Any] | None = None,
        progress: bool | None = None,
    ) -> PipelineOutput:
        """What follows each prompt: rows of any kind and length in one batch. The class says what the arguments are.

        Raises:
            ValueError, TypeError: an argument that does not fit, named with the fix.
            FloatingPointError: NaN, in the weights for instance.
        """
        check_output_type(output_type)
        rows = rows_of(prompt, image, mask_image, output)
        channels, *usual = self.latent_shape
        shape = channels, self._side("height", height, usual[0]), self._side("width", width, usual[1])
        requests = [self._request(row, max_new_tokens, max_images, shape) for row in rows]
        chosen, steps = self._scheduler(scheduler, num_inference_steps)
        stops, on_step_end = StopStrings(self.tokenizer, stop), self._on_step_end(callback_on_step_end)
        guidance = Guidance(guidance_scale, guidance_interval, guidance_rescale)
        sampling = TextSampling(temperature, top_k, top_p, min_p)
        check_call(self.model, requests, shape, chosen, steps, self.max_length)
        seeds = seeds_of(seed, generator, len(rows))  # last: a call that is refused leaves the generator as it was
        done = generate(
            self.model,
            [replace(request, seed=own) for request, own in zip(requests, seeds, strict=True)],
            latent_shape=shape,
            scheduler=chosen,
            steps=steps,
            guidance=guidance,
            sampling=sampling,
            stop=stops.reached if stops.strings else None,
            max_length=self.max_length,
            on_step_end=on_step_end,
            on_token=self._on_token(callback_on_text, stops),
            progress=sys.stderr.isatty() if progress is None else progress,
        )
        return self._output(done, stops, output_type, shape)

    def _side(self, name: str, given: SupportsIndex | None, usual: int) -> int:
        """Of the latents, for so many pixels of the images."""
        if given is None:
            return usual
        pixels, downscale = whole(name, given), self.autoencoder.downscale
        check_image_size(pixels, downscale, self.model.config.patch_size, name)
        return pixels // downscale

    def _request(self, row: Row, max_new_tokens: int, max_images: int, shape: tuple[int, int, int]) -> Request:
        text = [torch.tensor([self.tokenizer.special.bos], device="cpu")]
        before: tuple[Text | Image, ...] = ()
        known = None
        if row.image is not None:
            latent_size, downscale = shape[1:], self.autoencoder.downscale
            size = latent_size[0] * downscale, latent_size[1] * downscale
            latent = self.autoencoder.encode(to_pixels(row.image, size)[None])[0]
            if row.mask_image is None:
                before, text = (Text(text[0]), Image(latent)), []
            else:
                known = Known(latent, to_unknown(row.mask_image, row.image, size, latent_size))
        if row.prompt is not None:
            text.append(self.tokenizer.encode(row.prompt))
        segments = (*before, Text(torch.cat(text))) if text else before
        tokens = 0 if row.output == "image" else max_new_tokens
        if row.output != "image" and whole("max_new_tokens", tokens) < 1:
            raise ValueError(f"max_new_tokens={tokens} asks for nothing where output={row.output!r}; give at least 1")
        images = {"image": 1, "text": 0, "both": max_images}[row.output]
        return Request(segments, tokens, images, row.output == "image", known=known)

    def _scheduler(self, scheduler: str | Any, steps: int | None) -> tuple[Any, int]:
        """A diffusers scheduler, and how many steps it takes. A model of pixels has its estimate clipped to theirs."""
        schedule = self.model.config.schedule
        count = default_steps(schedule, scheduler) if steps is None else steps
        if not isinstance(scheduler, str):
            return scheduler, count
        clips = isinstance(self.autoencoder, PixelAutoencoder) and can_clip(schedule, scheduler)
        return make_scheduler(schedule, scheduler, clips), count

    def _on_step_end(self, callback: Callback | None) -> OnStepEnd | None:
        function("callback_on_step_end", callback)
        if callback is None:
            return None

        def on_step_end(step: int, timestep: Tensor, latents: Tensor) -> Tensor:
            given = callback(self, step, timestep, {"latents": latents})
            if given is not None and not isinstance(given, dict):
                raise TypeError(f"callback_on_step_end must give a dict or None, got {type(given).__name__}")
            changed: Tensor = (given or {}).get("latents", latents)
            return changed  # `sample` looks at it

        return on_step_end

    def _on_token(self, callback: Callable[[int, str], Any] | None, stops: StopStrings) -> OnToken | None:
        function("callback_on_text", callback)
        if callback is None:
            return None

        def on_token(row: int, token_ids: Sequence[int]) -> None:
            text = self.tokenizer.decode(token_ids)
            callback(row, stops.cut(text.rstrip("\ufffd")))  # of a character whose last bytes are to come

        return on_token

    def _output(
        self, done: Sequence[Generation], stops: StopStrings, output_type: str, shape: tuple[int, int, int]
    ) -> PipelineOutput:
        latents = [latent for each in done for latent in each.images]
        images: Any = torch.stack(latents) if latents else _none(*shape)
        if output_type != "latent" and latents:
            images = from_pixels(self.autoencoder.decode(images), output_type)
        elif output_type != "latent":
            sides = (side * self.autoencoder.downscale for side in shape[1:])
            images = [] if output_type == "pil" else _none(3, *sides)
        documents, count = [], 0
        for each in done:
            document: list[str | int] = []
            for segment in each.new:
                if isinstance(segment, Text):
                    document.append(stops.cut(self.tokenizer.decode(segment.token_ids)))
                else:
                    document.append(count)
                    count += 1
            documents.append(document)
        text = ["".join(part for part in document if isinstance(part, str)) for document in documents]
        logprobs, reasons = [each.logprobs for each in done], [each.finish_reason for each in done]
        return PipelineOutput(images, text, documents, logprobs, reasons)

    # ---------------------------------------------------------------- one task at a time

    def images(
        self,
        prompts: Sequence[str],
        *,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance_scale: float = 3.0,
        scheduler: str | Any = "fast",
        seed: int | Sequence[int] = 0,
        progress: bool = False,
    ) -> Tensor:
        """Captions, and what they change, if anything -> (I, 3, H, W) float32 in [-1, 1]. Image i starts from the noise
        of seed + i, or of seed[i]; H and W are as in a call."""
        done = self(
            prompts,
            image=image,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
            seed=seed,
            output="image",
            output_type="latent",
            progress=progress,
        )
        return self.autoencoder.decode(done.images)

    def captions(
        self, images: Tensor | Sequence[Any], *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """(I, 3, H, W) in [-1, 1], or images as a call takes them, -> a caption of each; greedy by default, as in the
        paper."""
        shown = list((images.float() + 1).clamp(0, 2) / 2) if isinstance(images, Tensor) else images
        done = self(image=shown, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        return [caption.strip() for caption in done.text]

    def continuations(
        self, texts: Sequence[str], *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """What the model writes after each text."""
        return self(texts, output="text", max_new_tokens=max_new_tokens, temperature=temperature, seed=seed).text

    def score(self, images: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """log p(text | image), EOS included, (I,) float32: how well each caption fits its image, in nats.

        Raises `ValueError` for a caption with which the document is longer than `max_length`, and for another number of
        them than images; `TypeError` for one string in the place of a list.
        """
        if isinstance(texts, str):
            raise TypeError(f"texts={texts!r} must be a list, one for each image")
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images and {len(texts)} texts; give one of each")
        if not len(images):
            raise ValueError("images is an empty list: give at least one image and its text")
        for index, (image, text) in enumerate(zip(images, texts, strict=True)):
            if image is None:
                raise ValueError(f"image {index} is None; `continuations` and `generation.score` are of text alone")
            of_kind(f"text {index}", text, str)
        rows = [Row(None, image, None, "text") for image in images]
        contexts = [self._request(row, 1, 0, self.latent_shape).context for row in rows]
        end = torch.tensor([self.tokenizer.special.eos], device="cpu")
        targets = [torch.cat([self.tokenizer.encode(text), end]) for text in texts]
        for index, (context, target) in enumerate(zip(contexts, targets, strict=True)):
            length = document_length(context, self.model.config.patch_size) + len(target)
            if self.max_length is not None and length > self.max_length:
                raise ValueError(
                    f"image {index} and its text have {length} tokens, more than max_length={self.max_length}, the "
                    "longest document of the model; give a shorter text"
                )
        return torch.stack([each.sum() for each in score(self.model, contexts, targets)])


def _instead(folder: Path) -> str:
    """What to do with a folder that could be taken for a pipeline's."""
    if any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        return "; it is a model alone, which Transfusion.from_pretrained reads"
    runs = [each for each in (folder, folder.parent) if (each / "checkpoints").is_dir()]
    return f"; `transfusion sample --run {runs[0]}` takes the run's last checkpoint" if runs else ""


def _none(*shape: int) -> Tensor:
    """No images of this shape."""
    return torch.zeros(0, *shape, dtype=torch.float32, device="cpu")
