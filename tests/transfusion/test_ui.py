"""The page of `transfusion demo-ui`: what a message comes to, then the page itself in a headless browser.

The functions behind the page are tested everywhere. The page is tested where Gradio (the extra `ui`) is installed, and
in a browser where Playwright and a Chromium are too (`pip install playwright`, and `playwright install chromium` or a
package of the system); none of them is in the extra `dev`, so a plain `make test` says which of these it left out.
"""

import copy
import itertools
import logging
import os
import re
import shutil
import socket
import sys
import threading
import time

import pytest
import rigged
import torch
from PIL import Image

from transfusion import cli, ui
from transfusion.data import PixelAutoencoder, Tokenizer
from transfusion.generation import TransfusionPipeline
from transfusion.ui import Settings, answer, converse

QUICK = Settings(steps=2, max_tokens=5, max_images=1)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ui") / "pipe"
    model, tokenizer = rigged.random_model(seed=3, vocab_size=300), Tokenizer.train(["red green"], 300)
    TransfusionPipeline(model, tokenizer, PixelAutoencoder(), (3, 16, 16), 200).save_pretrained(folder)
    return TransfusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "fruit.png"
    Image.new("RGB", (40, 30), "orange").save(path)
    return str(path)


def kinds(parts):
    return ["image" if isinstance(part, Image.Image) else "text" for part in parts]


def conversation(pipeline, message, settings=QUICK, history=(), **told):
    kept = []

    def keep(image):
        kept.append(image)
        return f"{len(kept)}.png"

    return converse(pipeline, keep, list(history), message, lambda: settings, **told)


def turns(pipeline, message, settings=QUICK, history=()):
    """What the page shows after the message: (messages, whether it failed) once asked and once answered."""
    asked, *between, answered = conversation(pipeline, message, settings, history)
    assert asked.state == "asked" and {turn.state for turn in between} <= {"going on"}
    return [(asked.messages, False), (answered.messages, {"answered": False, "failed": True}[answered.state])]


@pytest.mark.parametrize(
    ("mode", "text", "with_image", "expected"),
    [
        ("auto", "red", False, ["image"]),
        ("auto", "", True, ["text"]),
        ("auto", "make it blue", True, ["image"]),
        ("image", "make it blue", True, ["image"]),
        ("text", "red", False, ["text"]),
        ("text", "what is it?", True, ["text"]),
    ],
)
def test_a_message_is_answered_in_its_kind(pipeline, picture, mode, text, with_image, expected):
    files = [picture] if with_image else []
    settings = Settings(mode=mode, steps=2, max_tokens=5)
    assert kinds(answer(pipeline, text, files, settings)) == expected


def test_the_image_and_the_prompt_both_matter(pipeline, picture, tmp_path):
    other = tmp_path / "other.png"
    Image.new("RGB", (16, 16), "navy").save(other)
    answers = [
        answer(pipeline, text, files, QUICK)[0].tobytes()
        for text, files in (("red", []), ("green", []), ("red", [picture]), ("red", [str(other)]))
    ]
    assert len(set(answers)) == 4


def test_a_story_has_text_and_images_in_turn(pipeline, monkeypatch):
    seen = {}

    class Done:
        images, documents = ["first", "second"], [["once ", 0, "", 1, " end"]]

    def call(self, prompt, **options):
        seen.update(options, prompt=prompt)
        return Done

    monkeypatch.setattr(TransfusionPipeline, "__call__", call)
    settings = Settings("story", 7, 2.5, 4, "ddim", 0.3, 9, 2)
    assert answer(pipeline, " a story ", [], settings) == ["once", "first", "second", "end"]
    wanted = {"prompt": "a story", "output": "both", "image": None, "seed": 7, "guidance_scale": 2.5}
    wanted |= {"num_inference_steps": 4, "scheduler": "ddim", "temperature": 0.3, "max_new_tokens": 9, "max_images": 2}
    assert seen.items() >= wanted.items()


def test_a_story_of_the_model_itself(pipeline):
    story = Settings("story", temperature=1.0, steps=2, max_tokens=40, max_images=2)
    assert set(kinds(answer(pipeline, "red", [], story))) <= {"text", "image"}


def test_same_seed_same_image_and_every_step_is_told(pipeline):
    steps = []
    first, again, other = (
        answer(pipeline, "red", [], Settings(seed=seed, steps=4), lambda *at: steps.append(at))[0].tobytes()
        for seed in (5, 5, 6)
    )
    assert first == again != other
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)] * 3


def test_every_scheduler_on_offer_samples(pipeline):
    offered = ui.schedulers(pipeline)
    assert offered == ["fast", "ddim", "ddpm", "dpmsolver"]
    for name in offered:
        answer(pipeline, "red", [], Settings(scheduler=name, steps=2))


@pytest.mark.parametrize(
    ("text", "names", "changes", "said"),
    [
        ("  ", [], {}, "the message is empty: write a prompt, or add an image"),
        ("red " * 300, [], {}, "longer than max_length=200"),
        ("", ["notes.png"], {}, "⚠ notes.png: unreadable image"),
        ("", ["missing.png"], {}, "missing.png"),
        ("", ["a.png", "b.png"], {}, "2 images; add one at a time"),
        ("", ["a.png"], {"mode": "image"}, "write how it is to change"),
        ("red", [], {"mode": "sing"}, "mode 'sing' is unknown"),
        ("red", [], {"scheduler": "euler"}, "scheduler 'euler' cannot sample"),
        ("red", [], {"steps": 7}, "steps=7 does not divide"),
        ("red", [], {"guidance": -1.0}, "guidance"),
        ("red", [], {"mode": "text", "temperature": -1.0}, "temperature"),
    ],
)
def test_mistakes_are_told_in_the_chat_and_the_next_message_works(pipeline, tmp_path, text, names, changes, said):
    (tmp_path / "notes.png").write_text("no picture")
    message = {"text": text, "files": [str(tmp_path / name) for name in names]}
    (asked, early), (answered, failed) = turns(pipeline, message, Settings(**{"steps": 2, **changes}))
    assert not early and failed and answered[:-1] == asked
    assert answered[-1]["role"] == "assistant" and said in answered[-1]["content"]
    assert str(tmp_path) not in answered[-1]["content"]
    assert not turns(pipeline, {"text": "red", "files": []}, history=answered)[-1][1]


def test_nan_weights_and_bugs_are_told_too(pipeline, monkeypatch, caplog):
    damaged = copy.deepcopy(pipeline)
    torch.nn.init.constant_(damaged.model.head.weight, torch.nan)
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        (*_, (answered, failed)) = turns(damaged, {"text": "red"}, Settings("text"))
        assert failed and "finite" in answered[-1]["content"] and not caplog.records
        patch.setattr(TransfusionPipeline, "__call__", lambda *_, **__: 1 / 0)
        (*_, (answered, failed)) = turns(pipeline, {"text": "red"})
        assert failed and "division by zero" in answered[-1]["content"]
        assert "ZeroDivisionError" in caplog.text  # which is no one's mistake but ours: with its traceback
    assert not turns(pipeline, {"text": "red"})[-1][1]


@pytest.fixture
def spelling(pipeline, monkeypatch):
    """The model says the letters of a word in turn; with `after` it then draws an image, and says those."""

    def spell(word, after=()):
        special, ids = pipeline.tokenizer.special, pipeline.tokenizer.encode(word).tolist()
        others = pipeline.tokenizer.encode("".join(after)).tolist()
        monkeypatch.setattr(rigged, "VOCABULARY", 300)
        chain = dict(itertools.pairwise([*ids, *([special.boi] if others else [])]))
        rigged.chain(pipeline.model, monkeypatch, chain | dict(itertools.pairwise([special.eoi, *others])))

    return spell


def said_by_the_model(turn):
    return [each["content"] for each in turn.messages[1:]]


def test_text_is_shown_as_it_comes(pipeline, spelling):
    spelling("abcd")
    between = list(conversation(pipeline, {"text": "a"}, Settings("text", temperature=0, max_tokens=9)))[1:-1]
    shown = [said_by_the_model(turn) for turn in between]
    assert [each for each, _ in itertools.groupby(shown)] == [["b"], ["bc"], ["bcd"]]


def test_a_story_is_shown_as_it_comes(pipeline, spelling):
    spelling("abc", "de")
    steps, settings = [], Settings("story", temperature=0, max_tokens=9, steps=2)
    *between, answered = conversation(pipeline, {"text": "a"}, settings, on_step=lambda *at: steps.append(at))
    shown = [said_by_the_model(turn) for turn in between[1:]]
    assert [each for each, _ in itertools.groupby(shown)] == [["b"], ["bc"], ["bc", "d"], ["bc", "de"]]
    assert steps == [(1, 2), (2, 2)] and said_by_the_model(answered)[:3] == ["bc", {"path": "1.png"}, "de"]


@pytest.mark.parametrize("mode", ["image", "text"])
def test_the_model_stops_when_nobody_waits(pipeline, spelling, monkeypatch, mode):
    if mode == "text":
        spelling("aba")  # without end
    threads, told, left, real = set(threading.enumerate()), [], threading.Event(), ui.answer

    def waiting(*arguments):
        *arguments, on_step, on_text = arguments

        def second(tell):
            def listen(*what):
                told.append(what)
                assert len(told) == 1 or left.wait(20)
                tell(*what)

            return listen

        return real(*arguments, second(on_step), second(on_text))

    monkeypatch.setattr(ui, "answer", waiting)
    talk = conversation(
        pipeline, {"text": "a"}, Settings(mode, steps=100, scheduler="ddim", temperature=0, max_tokens=100)
    )
    while next(talk).state != "going on":
        pass
    (answering,) = set(threading.enumerate()) - threads
    talk.close()
    left.set()
    answering.join(20)
    assert not answering.is_alive() and len(told) == 2
    monkeypatch.undo()
    assert not turns(pipeline, {"text": "red"})[-1][1]


def test_a_conversation_keeps_what_was_said(pipeline, picture):
    (asked, _), (answered, failed) = turns(pipeline, {"text": "blue", "files": [picture]}, history=["before"])
    assert not failed and asked[0] == "before"
    assert [each["content"] for each in asked[1:]] == [{"path": picture}, "blue"]
    image, note = answered[3:]
    assert image == {"role": "assistant", "content": {"path": "1.png"}} and note["content"].startswith("seed 0 ·")


def test_an_empty_number_is_named():
    assert ui.settings_of("auto", 3.0, 2, None, "fast", 0, 5, 1) == Settings("auto", 3, 2.0, None, "fast", 0.0, 5, 1)
    with pytest.raises(ValueError, match="seed and temperature is empty"):
        ui.settings_of("auto", None, 2, None, "fast", None, 5, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "a", "--model", "b"], "give one of --run"),
        (["--model", "nowhere"], "nowhere is no saved pipeline|pip install transfusion-kernels\\[ui\\]"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, capsys):
    assert cli.main(["demo-ui", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["demo-ui", "--model", "nowhere"]) == 2
    assert "pip install transfusion-kernels[ui]" in capsys.readouterr().err


# ---------------------------------------------------------------- the page itself


@pytest.fixture(scope="module")
def url(pipeline):
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install transfusion-kernels[ui]")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # of gradio_client, with which we ask; the page itself has it off
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    blocks = ui.serve(pipeline, ui.UiOptions(port=port), block=False)
    yield f"http://127.0.0.1:{port}/"
    blocks.close()


def test_a_port_that_is_taken_is_an_error(url, pipeline):
    port = int(url.rsplit(":", 1)[1].strip("/"))
    with pytest.raises(OSError, match=str(port)):
        ui.serve(pipeline, ui.UiOptions(port=port), block=False)


def test_users_who_come_at_once_wait_for_each_other(url, pipeline, monkeypatch):
    client = pytest.importorskip("gradio_client")
    running, most, done, real = [], [], [], TransfusionPipeline.__call__

    def watched(self, *arguments, **options):
        running.append(1)
        most.append(len(running))
        time.sleep(0.3)
        try:
            return real(self, *arguments, **options)
        finally:
            running.pop()

    def ask(seed):
        values = ["auto", seed, 1.0, 2, "fast", 0.0, 5, 1]
        own = client.Client(url, verbose=False, analytics_enabled=False)
        done.append(own.predict({"text": "red", "files": []}, None, True, *values, api_name="/chat"))

    monkeypatch.setattr(TransfusionPipeline, "__call__", watched)
    users = [threading.Thread(target=ask, args=(seed,)) for seed in (3, 4, 5)]
    for user in users:
        user.start()
    for user in users:
        user.join(60)
    assert len(done) == 3 and most == [1, 1, 1]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="the browser test needs Playwright: pip install playwright"
    )
    installed = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as started:
        try:
            opened = started.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium to drive: {str(error).splitlines()[0]}; try: playwright install chromium")
        yield opened
        opened.close()


def test_the_page_in_a_browser(url, browser, picture, tmp_path):
    expect = pytest.importorskip("playwright.sync_api").expect
    asked, broken = set(), tmp_path / "broken.png"
    broken.write_text("no picture")
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(20_000)
    page.on("request", lambda request: asked.add(request.url))
    page.goto(url)
    box, replies = page.locator("#message textarea"), page.locator("#chat [data-testid=bot]")

    def send(text="", file=None):
        if file is not None:
            page.set_input_files("#message input[type=file]", file)
            expect(page.locator("#message .thumbnail-item")).to_have_count(1)
        expect(box).to_be_enabled()
        box.fill(text)
        box.press("Enter")

    page.locator("#steps input").fill("4")
    send("a red apple")
    drawn = page.locator("#chat .bot img")
    expect(drawn).to_have_count(1)
    page.wait_for_function("() => document.querySelector('#chat .bot img').naturalWidth == 16")
    assert drawn.bounding_box()["width"] == 224  # large enough to be seen
    expect(replies.last).to_contain_text("seed 0 ·")
    expect(page.locator("#seed input")).to_have_value("1")

    send(file=picture)  # an image alone is captioned
    expect(replies.last).to_contain_text("seed 1 ·")
    assert replies.count() == 4 and page.locator("#chat .user img").count() == 1

    send("make it blue", picture)  # with an instruction it is changed
    expect(drawn).to_have_count(2)
    expect(replies.last).to_contain_text("seed 2 ·")

    for text, file, said in (
        ("", str(broken), "broken.png: unreadable image"),
        ("red " * 300, None, "max_length"),
    ):
        send(text, file)
        expect(replies.last).to_contain_text(said)
        page.reload()  # a new user, so that nothing of the message stays in the box

    send("still here")
    expect(page.locator("#chat .bot img")).to_have_count(1)
    assert page.locator("button[aria-label=Share]:visible").count() == 0
    away = {address for address in asked if not address.startswith((url, "data:", "blob:"))}
    assert not away  # nothing leaves the machine
    page.close()


def test_an_answer_is_stopped_in_a_browser(url, browser, monkeypatch):
    expect = pytest.importorskip("playwright.sync_api").expect
    steps, real = [], TransfusionPipeline.__call__

    def slow(self, *arguments, callback_on_step_end, **options):
        def step(*told):
            steps.append(time.monotonic())
            time.sleep(0.1)
            return callback_on_step_end(*told)

        return real(self, *arguments, callback_on_step_end=step, **options)

    monkeypatch.setattr(TransfusionPipeline, "__call__", slow)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(20_000)
    page.goto(url)
    box, replies = page.locator("#message textarea"), page.locator("#chat [data-testid=bot]")
    page.locator("#steps input").fill("500")
    box.fill("a red apple")
    box.press("Enter")
    expect(page.locator("#progress")).to_contain_text("denoising")
    page.locator("#message .stop-button").click()
    expect(replies.last).to_contain_text("(stopped)")
    expect(page.locator("#message .stop-button")).to_have_count(0)
    time.sleep(1)
    assert len(steps) < 500 and time.monotonic() - steps[-1] > 0.5  # the model does not go on by itself
    page.locator("#steps input").fill("2")
    box.fill("a green apple")
    box.press("Enter")
    expect(page.locator("#chat .bot img")).to_have_count(1)

    page.locator("#steps input").fill("500")  # who leaves stops it too
    box.fill("a red apple")
    box.press("Enter")
    expect(page.locator("#progress")).to_contain_text("denoising")
    page.close()
    deadline = time.monotonic() + 20
    while time.monotonic() - steps[-1] < 1:
        assert time.monotonic() < deadline, "the model goes on by itself"
        time.sleep(0.1)
