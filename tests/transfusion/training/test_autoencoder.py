"""Training a tiny AutoencoderKL: it learns, resumes bit for bit, survives bad numbers and files, and works after."""

import json
import logging
import os
import random
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from transfusion.data.autoencoder import DiffusersAutoencoder
from transfusion.data.sources import CaptionedImage, SampleError
from transfusion.data.transforms import to_tensor
from transfusion.training import autoencoder
from transfusion.training.autoencoder import AutoencoderConfig, AutoencoderTrainer, feature_distance
from transfusion.training.metrics import read_log

CONFIG = AutoencoderConfig(
    image_size=8,
    latent_channels=2,
    channels=(4, 8),
    steps=6,
    batch_size=3,
    learning_rate=5e-3,
    checkpoint_every=3,
    ema_decay=0.9,
)
WEIGHTS = "diffusion_pytorch_model.safetensors"


class Pictures:
    """`count` images of a few random blocks; some unreadable."""

    def __init__(self, count: int = 5, broken: tuple[int, ...] = ()) -> None:
        rng = np.random.default_rng()
        small = rng.integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
        self.pixels = small.repeat(4, axis=1).repeat(4, axis=2)
        self.names = [f"image {i}" for i in range(count)]
        self.captions, self.skipped, self.broken = self.names, [], broken

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> CaptionedImage:
        if index in self.broken:
            raise SampleError(self.names[index], "broken on purpose")
        return CaptionedImage("", Image.fromarray(self.pixels[index]), self.names[index])


def test_it_learns_and_what_it_writes_is_an_autoencoder_of_unit_latents(tmp_path):
    images = Pictures()
    config = replace(CONFIG, channels=(8, 16), learning_rate=1e-2, steps=80, checkpoint_every=80)
    assert AutoencoderTrainer(config, images, tmp_path).run()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 80 and log[-1]["l1"] < log[0]["l1"]
    autoencoder = DiffusersAutoencoder(tmp_path)
    assert (autoencoder.latent_channels, autoencoder.downscale) == (2, 2)
    originals = torch.stack([to_tensor(images[i].image, 8) for i in range(5)])
    latents = torch.cat([autoencoder.encode(image[None]) for image in originals])
    assert latents.mean().item() == pytest.approx(0, abs=1e-3) and latents.std().item() == pytest.approx(1, abs=1e-3)
    error = (autoencoder.decode(latents) - originals).abs().mean()
    assert error < 0.7 * (originals - originals.mean((0, 2, 3), keepdim=True)).abs().mean()
    sheet = np.asarray(Image.open(tmp_path / "reconstructions.png"))
    assert sheet.shape == (2 * 8, 8 * 8, 3)
    assert not list(tmp_path.glob("*.tmp*"))


def test_six_steps_are_three_and_three_more_bit_for_bit(tmp_path):
    images, seed = Pictures(), random.getrandbits(30)
    config = replace(CONFIG, seed=seed)
    assert AutoencoderTrainer(config, images, tmp_path / "whole").run()
    half = AutoencoderTrainer(config, images, tmp_path / "half")
    batches = half._batches(0)
    for _ in range(3):
        half.train_step(next(batches))
        half.step += 1
    half._save()
    resumed = AutoencoderTrainer(config, images, tmp_path / "half")
    assert resumed.run() and resumed.step == 6
    whole, again = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "half"))
    assert all(torch.equal(whole[name], again[name]) for name in whole), f"seed {seed}"
    other = AutoencoderTrainer(replace(config, seed=seed + 1), images, tmp_path / "other")
    other.run()
    assert any(not torch.equal(whole[n], w) for n, w in load_file(tmp_path / "other" / WEIGHTS).items())


def test_a_signal_saves_and_the_next_run_ends_it(tmp_path):
    trainer = AutoencoderTrainer(CONFIG, Pictures(), tmp_path, perceptual=lambda x, y: (x - y).square())
    step = trainer.train_step

    def interrupted(images):
        if trainer.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(images)

    trainer.train_step = interrupted
    assert not trainer.run()
    assert trainer.checkpoints.paths()[-1].name == "step-00000002" and not (tmp_path / "config.json").exists()
    again = AutoencoderTrainer(CONFIG, Pictures(), tmp_path, perceptual=lambda x, y: (x - y).square())
    assert again.run() and (tmp_path / "config.json").exists()


def test_its_log_is_on_disk_and_has_each_step_once(tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoder, "_LOG_EVERY", 1)
    trainer, lines = AutoencoderTrainer(CONFIG, Pictures(), tmp_path), []
    step = trainer.train_step

    def killed(images):
        lines.append([line["step"] for line in read_log(tmp_path / "log.jsonl")])
        if trainer.step == CONFIG.steps - 1:
            raise KeyboardInterrupt  # after a checkpoint, before the next
        return step(images)

    trainer.train_step = killed
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert lines == [list(range(1, 1 + count)) for count in range(CONFIG.steps)]
    assert AutoencoderTrainer(CONFIG, Pictures(), tmp_path).run()
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == list(range(1, 1 + CONFIG.steps))


def test_the_loss_is_what_the_first_line_says(tmp_path):
    config = replace(CONFIG, kl_weight=0.5, perceptual_weight=3.0, max_grad_norm=1e9)
    trainer = AutoencoderTrainer(config, Pictures(), tmp_path, perceptual=lambda x, y: (x - y).square())
    images = next(trainer._batches(0))
    with torch.no_grad():
        posterior = trainer.vae.encode(images).latent_dist
        mean, log_variance = posterior.parameters.chunk(2, dim=1)
    losses = trainer.train_step(images)
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum() / images.numel()
    torch.testing.assert_close(losses["kl"], kl)
    assert set(losses) == {"l1", "kl", "perceptual"} and losses["perceptual"] > 0


def test_steps_that_are_not_finite_change_nothing_and_end_the_run_in_the_end(tmp_path, caplog):
    bad = {"from": 3}

    def perceptual(x, y):
        return (x - y).square() * (float("nan") if trainer.step >= bad["from"] else 1.0)

    config = replace(CONFIG, steps=40, max_bad_steps=4)
    trainer = AutoencoderTrainer(config, Pictures(), tmp_path, perceptual=perceptual)
    with caplog.at_level(logging.WARNING), pytest.raises(FloatingPointError, match=r"Last checkpoint: .*step-000000"):
        trainer.run()
    assert "not finite" in caplog.text
    assert all(parameter.isfinite().all() for parameter in (*trainer.vae.parameters(), *trainer.ema.parameters()))
    bad["from"] = 10**9
    trainer = AutoencoderTrainer(config, trainer.images, tmp_path, perceptual=perceptual)
    assert trainer.run() and trainer.step == 40


def test_unreadable_images_are_named_and_replaced(tmp_path, caplog):
    trainer = AutoencoderTrainer(CONFIG, Pictures(5, broken=(1, 3)), tmp_path)
    with caplog.at_level(logging.WARNING):
        assert trainer.run()
    assert sorted(trainer.skipped) == ["image 1", "image 3"] and caplog.text.count("image 1: broken") == 1
    with pytest.raises(ValueError, match="none of the 2 images can be read"):
        AutoencoderTrainer(CONFIG, Pictures(2, broken=(0, 1)), tmp_path / "none").run()


def test_a_folder_of_another_training_is_refused(tmp_path):
    AutoencoderTrainer(CONFIG, Pictures(), tmp_path)
    said = rf"another autoencoder \(latent_channels {CONFIG.latent_channels}, now 3\); give another"
    with pytest.raises(ValueError, match=said):
        AutoencoderTrainer(replace(CONFIG, latent_channels=3), Pictures(4), tmp_path)


def test_one_goes_on_when_images_come(tmp_path, caplog):
    trainer = AutoencoderTrainer(CONFIG, Pictures(), tmp_path)
    trainer.train_step(next(trainer._batches(0)))
    trainer.step = 1
    trainer._save()
    again = AutoencoderTrainer(CONFIG, Pictures(7), tmp_path)
    assert "it had 5 images and has 7 now" in caplog.text
    assert again.run() and (tmp_path / "config.json").is_file()
    caplog.clear()
    AutoencoderTrainer(CONFIG, Pictures(7), tmp_path)
    assert not caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be positive and finite, got -1.0"),
        ({"kl_weight": float("nan")}, "kl_weight must be finite and not negative, got nan"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be positive, got -1.0"),
        ({"channels": ()}, "channels must be positive"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
        ({"image_size": 9}, "image_size=9"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_a_perceptual_distance_is_of_the_features_of_a_file(tmp_path):
    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 5, 3)

        def forward(self, images):
            return self.layer(images).relu().mean((2, 3))

    network = Features()
    torch.jit.script(network).save(tmp_path / "features.pt")
    distance = feature_distance(tmp_path / "features.pt")
    x, y = torch.rand(2, 4, 3, 8, 8) * 2 - 1
    y.requires_grad_()
    with torch.no_grad():
        expected = (network((x + 1) / 2) - network((y + 1) / 2)).square().mean()
    distance(x, y).backward()
    assert torch.equal(distance(x, y), expected) and y.grad.abs().sum() > 0
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        feature_distance(tmp_path / "none.pt")
