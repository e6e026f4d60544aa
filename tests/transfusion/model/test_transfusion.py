"""The model: the paper's sizes, its losses written plainly, its independence of packing and of the kernels used."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch.nn import functional

from transfusion import ModelConfig, Transfusion, presets
from transfusion.diffusion.schedule import NoiseSchedule
from transfusion.kernels import philox
from transfusion.kernels.testing import judge
from transfusion.sequence import Image, SpecialTokens, Text, collate, image_tokens

# arXiv 2408.11039, table 2, with Llama's shape and an untied vocabulary of 32,000
PAPER = {"0.16b": 162e6, "0.37b": 374e6, "0.76b": 778e6, "1.4b": 1364e6, "7b": 6738e6}
# tables 6 and 7: the preset of each row, the transformer it is built around, and what its U-Net adds, in billions
TABLES = {name: (name, None) for name in PAPER}
TABLES |= {f"{name}-unet": (name, 0.17 if name == "0.16b" else 0.27) for name in PAPER}
TABLES |= {f"0.76b-{side}": ("0.76b", None) for side in ("1x1", "4x4", "8x8")}
TABLES |= {f"0.76b-unet-{side}": ("0.76b", 0.27) for side in ("4x4", "8x8")}


@pytest.mark.parametrize("name", TABLES)
def test_parameters_of_the_papers_models(name: str) -> None:
    """Every row builds on the meta device, and has the paper's count, rounded as the paper rounds it."""
    with torch.device("meta"):
        model = Transfusion(presets.get(name))
    backbone, unet = TABLES[name]
    codec = sum(p.numel() for p in model.codec.parameters())
    assert round((model.num_parameters() - codec) / 1e6) == PAPER[backbone] / 1e6
    if unet is None:
        assert codec < 0.005 * model.num_parameters()  # the paper: a linear codec adds less than 0.5 %
    else:
        assert round(codec / 1e9, 2) == unet


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("0.76b-1x1", 1024),
        ("0.76b", 256),
        ("0.76b-4x4", 64),
        ("0.76b-8x8", 16),
        ("0.76b-unet", 256),
        ("0.76b-unet-4x4", 64),
        ("0.76b-unet-8x8", 16),
    ],
)
def test_tokens_of_an_image_in_each_row_of_table_6(name: str, tokens: int) -> None:
    config = presets.get(name)
    assert image_tokens((config.latent_channels, 32, 32), config.patch_size) == tokens


def test_losses_are_the_papers() -> None:
    """L_LM + λ·L_DDPM from the model's own hidden states, with noise, target and patches written out."""
    model, batch = tiny.model(), tiny.Batches().batch(3)
    losses = model(batch, "reference")
    schedule, patch = model.config.schedule, model.config.patch_size
    path = schedule.coefficients(schedule.timestep(batch.times))
    noise = philox.randn(batch.latents.shape, batch.noise_seed)
    alpha, sigma, data, eps = (c.view(-1, 1, 1, 1) for c in path)

    def patches(image: torch.Tensor) -> torch.Tensor:
        count, channels, height, width = image.shape
        cut = image.view(count, channels, height // patch, patch, width // patch, patch)
        return cut.permute(0, 2, 4, 3, 5, 1).reshape(count, -1, patch * patch * channels)

    noised = patches(alpha * batch.latents + sigma * noise)
    hidden = model.hidden(batch, noised, schedule.timestep(batch.times), "reference").flatten(0, 1)
    text = functional.cross_entropy(model.head(hidden[batch.text_rows]), batch.text_targets)
    prediction = model.codec.decode(hidden[batch.image_rows].view(batch.num_images, -1, model.config.dim))
    image = (prediction - patches(data * batch.latents + eps * noise)).square().mean()
    torch.testing.assert_close(losses.text, text)
    torch.testing.assert_close(losses.image, image)
    torch.testing.assert_close(losses.total, text + 5 * image)
    torch.testing.assert_close(losses.per_image.mean(), image)


def test_a_document_does_not_see_its_neighbours() -> None:
    """Packed or alone, a document's hidden states are the same; so mask and positions are the document's own."""
    model, special = tiny.model(), SpecialTokens()
    latents = torch.randn(2, 3, 4, 4)
    first = (Text(torch.tensor([1, 7, 8])), Image(latents[0]), Text(torch.tensor([9, 2])))
    second = (Text(torch.tensor([1, 30])), Image(latents[1]), Text(torch.tensor([2])))
    packed = collate([[first, second]], 24, 2, special, torch.Generator())
    alone = collate([[second]], 24, 2, special, torch.Generator())
    patches = torch.randn(2, 4, 12)
    timestep = torch.tensor([100, 500])
    together = model.hidden(packed, patches, timestep)[0, 11:20]
    single = model.hidden(alone, patches[1:], timestep[1:])[0, :9]
    torch.testing.assert_close(together, single)


def test_an_image_sees_all_of_itself_and_nothing_later() -> None:
    model, batch = tiny.model(), tiny.Batches(rows=1).batch(0)
    patches = torch.randn(batch.num_images, 4, 12, requires_grad=True)
    hidden = model.hidden(batch, patches, torch.tensor([10] * batch.num_images)).flatten(0, 1)
    first, last = batch.image_rows[0], batch.image_rows[3]
    (grad,) = torch.autograd.grad(hidden[first].sum(), patches, retain_graph=True)
    assert (grad[0].abs().sum(-1) > 0).all()  # the first patch sees the last one
    (grad,) = torch.autograd.grad(hidden[first - 1].sum(), patches, retain_graph=True)
    assert (grad == 0).all()  # BOI sees none
    (grad,) = torch.autograd.grad(hidden[last + 1].sum(), patches)
    assert (grad[0].abs().sum(-1) > 0).all()  # EOI sees all


def test_kernels_and_references_give_the_same_losses_and_gradients() -> None:
    """The kernels are as close to float64 as the references are, within the rule of the kernels' tests."""
    batch = tiny.Batches().batch(1).to(tiny.DEVICE)
    results = {}
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        model = tiny.model().to(tiny.DEVICE, dtype)
        losses = model(replace(batch, latents=batch.latents.to(dtype)), impl)
        losses.total.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results[impl, dtype] = torch.stack([losses.text, losses.image, losses.total]), grads
    for actual, eager, gold in zip(*results.values(), strict=True):
        verdict = judge(actual, eager, gold.double())
        assert verdict.passed, verdict


def test_a_batch_that_does_not_fit_the_model_is_named() -> None:
    model, generator = tiny.model(), torch.Generator()
    with pytest.raises(
        TypeError, match=r"a model reads a Batch, got Tensor; `transfusion\.sequence\.collate` makes one"
    ):
        model(torch.zeros(1, 4))
    row = [[(Text(torch.tensor([1])), Image(torch.zeros(8, 4, 4)))]]
    with pytest.raises(ValueError, match="images of 8 channels do not fit the model: it has latent_channels=3"):
        model(collate(row, 30, 2, SpecialTokens(), generator))
    row = [[(Text(torch.tensor([1])), Image(torch.zeros(3, 4, 4)))]]
    with pytest.raises(
        ValueError, match=r"has 1 image tokens, and latents \(1, 3, 4, 4\) are 4 in the model's patches of 2"
    ):
        model(collate(row, 30, 4, SpecialTokens(), generator))
    for channels, patch, said in (
        (8, 2, "images of 8 channels"),
        (3, 4, "has 3 image tokens, and latents of several sizes"),
    ):
        row = [[(Text(torch.tensor([1])), *(Image(torch.zeros(channels, 4, side)) for side in (4, 8)))]]
        with pytest.raises(ValueError, match=said):
            model(collate(row, 30, patch, SpecialTokens(), generator))
    size = model.config.vocab_size
    for wrong, found in ((size, f"1 to {size}"), (-1, "-1 to 2")):
        with pytest.raises(ValueError, match=rf"token ids {found} do not fit the model's vocab_size={size}"):
            model(collate([[(Text(torch.tensor([1, wrong, 2])),)]], 3, 2, SpecialTokens(), generator))


class Adapter(torch.nn.Module):
    """y = W·x + B·A·x, as LoRA has it."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Parameter(torch.randn(2, base.in_features))
        self.up = torch.nn.Parameter(torch.randn(base.out_features, 2))

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def test_an_adapter_or_a_hook_of_the_head_takes_part_in_the_text_loss() -> None:
    model, batch = tiny.model(), tiny.Batches().batch(0)
    usual, seen = model(batch).text, []
    hook = model.head.register_forward_hook(lambda module, args, out: seen.append(out))
    through = model(batch).text
    gold = functional.cross_entropy(seen[0].double(), batch.text_targets)
    assert len(seen) == 1 and judge(through, usual, gold).passed
    hook.remove()
    model.head = Adapter(model.head)  # type: ignore[assignment]
    adapted = model(batch).text
    adapted.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.head.parameters())
    assert not judge(adapted, usual, gold).passed


def test_every_parameter_learns() -> None:
    model = tiny.model()
    model(tiny.Batches().batch(0)).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow_prediction", "trigflow"])
def test_every_noise_schedule_trains(prediction: str) -> None:
    model = tiny.model(replace(tiny.CONFIG, schedule=NoiseSchedule(prediction), kv_heads=1))  # type: ignore[arg-type]
    losses = model(tiny.Batches().batch(0))
    losses.total.backward()
    assert losses.total.isfinite()


def test_text_only_and_image_only_batches() -> None:
    model, special = tiny.model(), SpecialTokens()
    text = collate([[(Text(torch.tensor([1, 5, 2])),)]], 8, 2, special, torch.Generator())
    assert model(text).image == 0
    assert model(text).total > 0
    image = collate([[(Image(torch.randn(3, 4, 4)),)]], 8, 2, special, torch.Generator())
    assert model(image).text == 0
    assert model(image).image > 0


def test_a_batch_compiles_whole() -> None:
    """One graph, no break: as the first thing that this model does."""
    torch._dynamo.reset()
    model, batch = tiny.model(), tiny.Batches().batch(0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch).total, model(batch).total)


def test_save_and_load(tmp_path: Path) -> None:
    model, batch = tiny.model(), tiny.Batches().batch(0)
    model.save_pretrained(tmp_path / "model")
    loaded = Transfusion.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert torch.equal(loaded(batch).total, model(batch).total)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.toml", "model.safetensors"]


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.toml"):
        Transfusion.from_pretrained(tmp_path)
    tiny.model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        Transfusion.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 30, "heads": 4}, "dim 30 does not split into 4 heads"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads 3"),
        ({"heads": 4, "kv_heads": 0}, "kv_heads 0"),
        ({"heads": 4, "kv_heads": -2}, "kv_heads -2"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"vocab_size": 4}, "special token 4 is outside the vocabulary of 4"),
    ],
)
def test_bad_configs_are_named(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ModelConfig(), **changes)


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"'8b'.*tiny, 0\.16b"):
        presets.get("8b")
