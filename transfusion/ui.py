"""transfusion demo-ui: a page to talk to a model on: text and images in, text and images out. Needs the extra `ui`.

    page(pipeline).launch()     what `main` does, with nothing that leaves the machine

`answer` computes the reply to a message and knows nothing of the page; `converse` runs it in a thread, shows the text
as it comes, and stops it when nobody is waiting any more; `page` puts that behind a queue of one, so that users who
come at the same time wait for each other and the model runs for one of them at a time.
"""

import contextvars
import functools
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from transfusion.optional import require

if TYPE_CHECKING:
    from transfusion.generation import TransfusionPipeline

MODES = {
    "auto": "A prompt draws an image, an image is captioned, an image with an instruction is changed as it says.",
    "image": "Draws an image of the prompt, or changes the image that you add as the prompt says.",
    "text": "Goes on with the prompt, or says something about the image that you add.",
    "story": "Text and images in turn, going on from the prompt and from the image that you add, if any.",
}
_QUEUE = 64  # users waiting at once; further ones are told that the queue is full
_UPLOAD = "20mb"
_KEPT = (3600, 86400)  # look every hour for pictures of the page that are older than a day, and delete them

_CSS = """
footer { display: none !important }
#chat .image-frame img { image-rendering: pixelated; object-fit: contain !important; border-radius: 6px;
  width: 224px !important; height: auto !important; max-width: 100% }
#chat button[aria-label="Share"] { display: none !important }  /* it would send the picture to Hugging Face */
#progress { min-height: 3rem }
#mode .wrap { flex-wrap: nowrap; gap: 4px }
#mode label { padding: 4px 6px }
"""

# Each step of denoising: (steps done, steps in all).
OnStep = Callable[[int, int], None]
OnText = Callable[[str], None]


@dataclass(frozen=True)
class UiOptions:
    """A page to talk to a model on.

    Args:
        run: folder of a run; if it has not finished, its last checkpoint's averaged weights are used.
        model: a saved pipeline in place of a run, as for `transfusion sample`; emoji-32 without either.
        host: address to listen on; 0.0.0.0 lets other machines in.
        port: to listen on.
        share: also give the page a public address, through Gradio's servers, for anyone who knows it.
        device: "auto" is CUDA where there is one.
    """

    run: Path | None = None
    model: Path | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    share: bool = False
    device: str = "auto"


@dataclass(frozen=True)
class Settings:
    """What a user may set: as in `TransfusionPipeline`. mode: one of `MODES`. steps: None is the usual number."""

    mode: str = "auto"
    seed: int = 0
    guidance: float = 3.0
    steps: int | None = None
    scheduler: str = "fast"
    temperature: float = 0.7
    max_tokens: int = 64
    max_images: int = 2


def main(arguments: Sequence[str]) -> int:
    """`transfusion demo-ui [--run DIR | --model DIR]`: serves the page until it is interrupted."""
    import tyro

    from transfusion.sampling_cli import SampleOptions, open_pipeline, with_model

    options = tyro.cli(UiOptions, args=list(arguments), prog="transfusion demo-ui")
    chosen = with_model(SampleOptions(run=options.run, model=options.model, device=options.device))
    require("gradio", "ui")  # before the model is loaded
    serve(open_pipeline(chosen), options)
    return 0


def serve(pipeline: "TransfusionPipeline", options: UiOptions, block: bool = True) -> Any:
    """Serves the page, with `block` until it is interrupted -> the page, whose `close()` ends it.

    Raises `OSError` if the port is taken.
    """
    if not 0 < options.port < 2**16:
        raise ValueError(f"--port {options.port} is no port; give one of 1 to 65535")
    host = options.host.strip("[]")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, options.port), family=family).close()
    except OSError as error:
        raise OSError(f"--port {options.port} of {options.host}: {error.strerror}; give another one") from error
    blocks = page(pipeline)
    blocks.launch(
        server_name=options.host,
        server_port=options.port,
        share=options.share,
        max_file_size=_UPLOAD,
        css=_CSS,
        theme="default",  # whose fonts come with it
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        prevent_thread_lock=not block,
    )
    return blocks


def answer(
    pipeline: "TransfusionPipeline",
    text: str,
    files: Sequence[str],
    settings: Settings,
    on_step: OnStep | None = None,
    on_text: OnText | None = None,
) -> list[Any]:
    """The model's reply to a message -> strings and PIL images, in turn.

    on_text: told the text since the last image after each token of it. What it or on_step raises ends the answer.

    Raises:
        ValueError: a message that does not fit its mode or the model, with what to change.
        FloatingPointError: NaN, in the weights for instance.
    """
    prompt, image, output = _asked(text, files, settings.mode)
    total = _steps(pipeline, settings.scheduler) if settings.steps is None else settings.steps

    def callback(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        if on_step is not None:
            on_step(step + 1, total)

    def told(_: int, text: str) -> None:
        if on_text is not None:
            on_text(text)

    done = pipeline(
        prompt,
        image=image,
        output=output,
        num_inference_steps=total,
        guidance_scale=settings.guidance,
        scheduler=settings.scheduler,
        seed=settings.seed,
        max_new_tokens=settings.max_tokens,
        max_images=settings.max_images,
        temperature=settings.temperature,
        callback_on_step_end=callback,
        callback_on_text=told,
        progress=False,
    )
    parts = [done.images[part] if isinstance(part, int) else part.strip() for part in done.documents[0]]
    return [part for part in parts if part] or ["(the model ended without a word)"]


def _asked(text: str, files: Sequence[str], mode: str) -> tuple[str | None, str | None, str]:
    """-> prompt, image and output, as the pipeline takes them. Raises `ValueError` for a message that does not fit."""
    prompt = text.strip() or None
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    if len(files) > 1:
        raise ValueError(f"{len(files)} images; add one at a time")
    if prompt is None and not files:
        raise ValueError("the message is empty: write a prompt, or add an image")
    if prompt is None and mode == "image":
        raise ValueError("an image without a prompt: write how it is to change, or take mode 'auto' for a caption")
    drawn = {"auto": "text" if prompt is None else "image", "story": "both"}
    return prompt, files[0] if files else None, drawn.get(mode, mode)


def _steps(pipeline: "TransfusionPipeline", scheduler: str) -> int:
    from transfusion.diffusion.sampler import default_steps

    return default_steps(pipeline.model.config.schedule, scheduler)


def schedulers(pipeline: "TransfusionPipeline") -> list[str]:
    """Names of the schedulers that step along the path on which the model was trained."""
    from transfusion.diffusion.sampler import SCHEDULERS

    path = pipeline.model.config.schedule.path
    return ["fast", *(name for name, kind in SCHEDULERS.items() if kind.path == path)]


def explain(error: Exception, files: Sequence[str]) -> str:
    """What the page says about a failed message; an error that is not the user's is logged with its traceback."""
    if not isinstance(error, ValueError | TypeError | OSError | FloatingPointError):
        logging.getLogger(__name__).error("a message of the page failed", exc_info=error)
    said = str(error) or type(error).__name__
    for file in files:  # a user knows the file by its name, not by where the server keeps it
        said = said.replace(file, Path(file).name)
    return f"⚠ {said}"


class Turn(NamedTuple):
    """The conversation as it stands, and what has just been added to it."""

    messages: list[Any]
    state: Literal["asked", "going on", "answered", "failed"]


def converse(
    pipeline: "TransfusionPipeline",
    keep: Callable[[Any], str],
    history: list[Any],
    message: dict[str, Any] | None,
    settings: Callable[[], Settings],
    on_step: OnStep | None = None,
) -> Generator[Turn, None, None]:
    """The conversation with the user's message, then with text as it comes, then with the answer or the error. Closing
    the generator early stops the model at the next token or step.

    keep: writes a PIL image where the page can show it -> the file. settings: may raise, as `answer` may.
    """
    message = message or {}
    text, files = message.get("text") or "", list(message.get("files") or ())
    given = [text] if text.strip() else []
    history = [*history, *(_said("user", part) for part in [*({"path": file} for file in files), *given])]
    yield Turn(history, "asked")
    began = time.monotonic()
    try:
        chosen = settings()
        answering = _Answering(functools.partial(answer, pipeline, text, files, chosen), on_step)
        try:
            for texts in answering.texts():
                yield Turn([*history, *(_said("assistant", part) for part in texts)], "going on")
            parts = answering.result()
        finally:
            answering.stop()
        told = [part if isinstance(part, str) else {"path": keep(part)} for part in parts]
        note = f"seed {chosen.seed} · {time.monotonic() - began:.1f} s"
        yield Turn([*history, *(_said("assistant", part) for part in [*told, note])], "answered")
    except Exception as error:  # whatever it is, the page keeps serving the other users
        yield Turn([*history, _said("assistant", explain(error, files))], "failed")


class _StoppedError(Exception):
    """Nobody is waiting for the answer any more."""


class _Answering:
    """`ask(on_step, on_text)` in a thread of its own, which can be followed, and stopped at a token or step."""

    def __init__(self, ask: Callable[[OnStep, OnText], list[Any]], on_step: OnStep | None) -> None:
        self._ask, self._on_step = ask, on_step
        self._told: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # a text, or None for a step
        self._done: Future[list[Any]] = Future()
        self._stopped = threading.Event()
        # with the context variables that tell Gradio whose progress this is
        threading.Thread(target=contextvars.copy_context().run, args=(self._run,), daemon=True).start()

    def _run(self) -> None:
        try:
            self._done.set_result(self._ask(self._step, self._tell))
        except BaseException as error:
            self._done.set_exception(error)
        self._told.put(None)

    def _step(self, done: int, total: int) -> None:
        if self._on_step is not None:
            self._on_step(done, total)
        self._tell(None)

    def _tell(self, what: str | None) -> None:
        if self._stopped.is_set():
            raise _StoppedError
        self._told.put(what)

    def texts(self) -> Iterator[list[str]]:
        """The text written so far, after each token and step, until its end."""
        texts = [""]
        while not (self._done.done() and self._told.empty()):
            told = self._told.get()
            if told is not None:
                texts[-1] = told
            elif texts[-1]:
                texts.append("")  # what comes after the image
            yield [text for text in texts if text.strip()]

    def result(self) -> list[Any]:
        """The answer; raises what `ask` raised."""
        return self._done.result()

    def stop(self) -> None:
        """At the next token or step."""
        self._stopped.set()


def _said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def page(pipeline: "TransfusionPipeline") -> Any:
    """-> Gradio's Blocks, with its queue: one message runs at a time. Raises `ImportError` without Gradio."""
    gr = require("gradio", "ui")
    images = require("gradio.processing_utils", "ui")
    bar = gr.Progress()
    with gr.Blocks(analytics_enabled=False, title="Transfusion", fill_height=True, delete_cache=_KEPT) as blocks:
        gr.Markdown(f"## Transfusion\n{_described(pipeline)}")
        with gr.Row(equal_height=False):
            with gr.Column(scale=3):
                chat = gr.Chatbot(elem_id="chat", height="60vh", render_markdown=False, show_label=False, buttons=[])
                progress = gr.HTML(elem_id="progress")
                box = gr.MultimodalTextbox(
                    elem_id="message",
                    file_types=["image"],
                    placeholder="a red apple   (or add an image)",
                    show_label=False,
                    max_lines=6,
                    autofocus=True,
                )
            with gr.Column(scale=1, min_width=320):
                inputs, seed, moves_on = _controls(gr, pipeline)

        free = {"interactive": True, "submit_btn": True, "stop_btn": False}
        busy = {"interactive": False, "submit_btn": False, "stop_btn": True}

        def reply(
            message: Any, history: Any, again: bool, *values: Any, progress: Any = bar
        ) -> Iterator[tuple[Any, ...]]:
            def on_step(step: int, total: int) -> None:
                progress((step, total), desc="denoising", unit="steps")

            def keep(image: Any) -> str:
                kept: str = images.save_pil_to_cache(image, chat.GRADIO_CACHE, format="png")
                return kept

            talk = converse(pipeline, keep, history or [], message, lambda: settings_of(*values), on_step)
            with closing(talk) as turns:
                for messages, state in turns:
                    if state == "asked":
                        yield messages, gr.MultimodalTextbox(value=None, **busy), gr.skip()
                    elif state == "going on":
                        yield messages, gr.skip(), gr.skip()
                    else:
                        failed = state == "failed"
                        following = values[1] + 1 if again and not failed else values[1]
                        yield messages, gr.MultimodalTextbox(value=message if failed else None, **free), following

        def stopped(history: Any) -> tuple[Any, ...]:
            return [*(history or []), _said("assistant", "(stopped)")], gr.MultimodalTextbox(**free)

        asking = box.submit(
            reply,
            [box, chat, moves_on, *inputs],
            [chat, box, seed],
            concurrency_limit=1,
            concurrency_id="model",
            show_progress_on=progress,
            api_name="chat",
        )
        halted = box.stop(None, cancels=asking, queue=False, api_visibility="private")
        halted.then(stopped, chat, [chat, box], queue=False, api_visibility="private")
    return blocks.queue(max_size=_QUEUE, default_concurrency_limit=1)


def settings_of(
    mode: str,
    seed: Any,
    guidance: Any,
    steps: Any,
    scheduler: str,
    temperature: Any,
    max_tokens: Any,
    max_images: Any,
) -> Settings:
    """The controls' values as `Settings`. Raises `ValueError` naming a number that is left empty."""
    numbers = {"seed": seed, "guidance": guidance, "temperature": temperature}
    empty = [name for name, value in {**numbers, "text": max_tokens, "images": max_images}.items() if value is None]
    if empty:
        raise ValueError(f"{' and '.join(empty)} is empty; give a number")
    count = int(steps) if steps else None
    return Settings(
        mode, int(seed), float(guidance), count, scheduler, float(temperature), int(max_tokens), int(max_images)
    )


def _described(pipeline: "TransfusionPipeline") -> str:
    height, width = (side * pipeline.autoencoder.downscale for side in pipeline.latent_shape[1:])
    device = pipeline.model.head.weight.device.type
    return f"{pipeline.model.num_parameters() / 1e6:.1f} million parameters, {height}×{width} pixels, on {device}"


def _controls(gr: Any, pipeline: "TransfusionPipeline") -> tuple[list[Any], Any, Any]:
    """The settings, in the order of `settings_of`; of them the seed; and whether it moves on after each answer."""
    mode = gr.Radio(list(MODES), value="auto", label="What to make", info=MODES["auto"], elem_id="mode")
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53 - 1, min_width=80, elem_id="seed")
        moves_on = gr.Checkbox(True, label="next seed after each", min_width=80)
    with gr.Accordion("Images"):
        guidance = gr.Slider(1.0, 10.0, 3.0, step=0.1, label="Guidance scale", info="1 is none")
        scheduler = gr.Dropdown(schedulers(pipeline), value="fast", label="Scheduler")
        steps = gr.Number(_steps(pipeline, "fast"), label="Steps", precision=0, minimum=1, elem_id="steps")
        max_images = gr.Slider(1, 8, 2, step=1, label="Images of a story, at most")
    with gr.Accordion("Text"):
        temperature = gr.Slider(0.0, 2.0, 0.7, step=0.05, label="Temperature", info="0 is the likeliest word")
        max_tokens = gr.Slider(1, 512, 64, step=1, label="Tokens, at most")
    scheduler.change(lambda name: _steps(pipeline, name), scheduler, steps, queue=False, api_visibility="private")
    mode.change(lambda name: gr.Radio(info=MODES[name]), mode, mode, queue=False, api_visibility="private")
    return [mode, seed, guidance, steps, scheduler, temperature, max_tokens, max_images], seed, moves_on
