"""RaggedLatents: their layout, and the ops on images of different sizes against a loop of dense calls."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from transfusion.kernels import RaggedLatents, denoise_step, diffusion_loss, patchify_noise, ragged_latents
from transfusion.kernels.patchify_noise import kernel
from transfusion.kernels.patchify_noise.check import make_weights
from transfusion.kernels.patchify_noise.reference import patchify
from transfusion.kernels.philox import randn
from transfusion.kernels.ragged_latents import image_of_element, image_of_token, tile_shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["triton", "reference"]
SIZES = ((4, 6), (16, 20), (2, 2), (8, 4))


def fresh_generator() -> torch.Generator:
    seed = random.randrange(2**32)
    print(f"input seed {seed}")
    return torch.Generator().manual_seed(seed)


def draw(generator: torch.Generator, channels: int = 3, sizes: tuple[tuple[int, int], ...] = SIZES) -> RaggedLatents:
    return RaggedLatents.pack([torch.randn(channels, *size, generator=generator).to(DEVICE) for size in sizes])


def fresh(channels: int = 3, sizes: tuple[tuple[int, int], ...] = SIZES) -> tuple[RaggedLatents, Tensor, Tensor]:
    """Latents and two weights per image."""
    generator = fresh_generator()
    ragged = draw(generator, channels, sizes)
    return ragged, *(make_weights(len(sizes), DEVICE, generator) for _ in range(2))


def test_the_layout_says_where_each_image_lies() -> None:
    rng = random.Random(random.randrange(2**32))
    sizes = tuple((rng.randint(1, 40), rng.randint(1, 40)) for _ in range(9))
    channels = rng.randint(1, 20)
    print(channels, sizes)
    ragged, *_ = fresh(channels, sizes)
    block = tile_shape(channels)[1]
    pixels = [height * width for height, width in sizes]
    firsts = [sum(pixels[:i]) for i in range(9)]
    tiles = [[i, start] for i in range(9) for start in range(0, pixels[i], block)]
    assert ragged.layout.tiles.tolist() == tiles
    rows = [[firsts[i], pixels[i], sizes[i][1], tiles.index([i, 0])] for i in range(9)]
    assert ragged.layout.planes.tolist() == rows
    assert all(count % ragged.layout.alignment == 0 for count in pixels) and 16 % ragged.layout.alignment == 0
    tokens = image_of_token(ragged.layout, 1, sum(pixels))
    assert tokens.tolist() == [i for i in range(9) for _ in range(pixels[i])]
    assert torch.equal(image_of_element(ragged.layout, len(ragged.values)), tokens.repeat_interleave(channels))


@pytest.mark.parametrize("source", ["noise", "seed"])
@pytest.mark.parametrize("impl", IMPLS)
def test_images_of_one_number_are_the_pixels_of_one_image(impl: str, source: str) -> None:
    """Bit for bit: six images, dense and ragged, and one of six pixels, all of the same weights."""
    generator = fresh_generator()
    values, noise, prediction, grad = torch.randn(4, 6, generator=generator).to(DEVICE)
    alpha, sigma = make_weights(2, DEVICE, generator).split(1)
    coefficients = make_weights(7, DEVICE, generator)
    seed = torch.randint(2**62, (), generator=generator).to(DEVICE)

    def calls(latents: Tensor | RaggedLatents, images: int, tokens: tuple[int, ...]) -> list[Tensor]:
        ragged = isinstance(latents, RaggedLatents)
        plain = latents.values if ragged else latents
        leaf = plain.clone().requires_grad_()
        options = {"seed": seed} if source == "seed" else {"noise": noise.view_as(plain)}
        inputs = alpha.expand(images), sigma.expand(images), 1
        noised = patchify_noise(latents.with_values(leaf) if ragged else leaf, *inputs, impl=impl, **options)
        noised.backward(grad.view_as(noised))
        guess = prediction.view(tokens).clone().requires_grad_()
        loss = diffusion_loss(guess, latents, *inputs, impl=impl, **options)
        loss.backward(torch.full_like(loss, 6 / images))
        if images == 6:
            assert torch.equal(loss, (prediction - noised.flatten()).square())
        after = denoise_step(guess.detach(), latents, coefficients, 1, impl=impl, **options)
        return [each.flatten() for each in (noised, leaf.grad, guess.grad, after.values if ragged else after)]

    one = calls(values.view(1, 1, 2, 3), 1, (1, 6, 1))
    dense = calls(values.view(6, 1, 1, 1), 6, (6, 1, 1))
    ragged = calls(RaggedLatents(values, 1, ((1, 1),) * 6), 6, (6, 1))
    for expected, *found in zip(one, dense, ragged, strict=True):
        assert all(torch.equal(each, expected) for each in found)


def test_images_come_back_and_move() -> None:
    images = [torch.randn(3, *size) for size in SIZES]
    ragged = RaggedLatents.pack(images)
    assert all(torch.equal(one, other) for one, other in zip(ragged.images(), images, strict=True))
    assert len(ragged) == 4 and ragged.channels == 3 and ragged.divisor == 2 and ragged.layout.alignment == 4
    moved = ragged.to("meta")
    assert moved.device.type == moved.layout.tiles.device.type == "meta" and moved.sizes == ragged.sizes
    half = ragged.with_values(ragged.values.half())
    assert half.values.dtype == torch.float16 and half.layout is ragged.layout


@pytest.mark.parametrize("patch_size", [1, 2])
def test_patchify_is_that_of_each_image(patch_size: int) -> None:
    ragged, *_ = fresh()
    expected = torch.cat([patchify(image[None], patch_size)[0] for image in ragged.images()])
    assert torch.equal(patchify(ragged, patch_size), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("sizes", "patch_size"), [(SIZES, 2), (((3, 5), (7, 1), (4, 9)), 1), (((8, 16), (24, 8)), 8)])
def test_against_a_loop_of_dense_calls(sizes: Any, patch_size: int, impl: str) -> None:
    """Bitwise, but for the loss, whose sums are ordered differently: within its own rounding."""
    ragged, alpha, sigma = fresh(5, sizes)
    noise = ragged.with_values(torch.randn_like(ragged.values))
    tokens = patchify_noise(ragged, alpha, sigma, patch_size, noise=noise.values, impl=impl)
    prediction = torch.randn_like(tokens)
    leaf = prediction.clone().requires_grad_()
    loss = diffusion_loss(leaf, ragged, alpha, sigma, patch_size, noise=noise.values, impl=impl)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    coefficients = torch.tensor([0.9, -0.4, 0.3, 0.2, 1.1, -0.7, 0.8], device=DEVICE)
    following = denoise_step(prediction, ragged, coefficients, patch_size, noise=noise.values, impl=impl)
    counts = [height * width // patch_size**2 for height, width in sizes]
    by_token = (each.split(counts) for each in (tokens, prediction, grad))
    parts = zip(ragged.images(), noise.images(), following.images(), *by_token, strict=True)
    for i, (image, z, after, token, guess, gradient) in enumerate(parts):
        weights, options = (alpha[i : i + 1], sigma[i : i + 1], patch_size), {"noise": z[None], "impl": impl}
        assert torch.equal(patchify_noise(image[None], *weights, **options)[0], token)
        one = guess[None].clone().requires_grad_()
        alone = diffusion_loss(one, image[None], *weights, **options)
        # Both are sums of as many positive numbers, each correctly rounded: n·eps/2 of the sum at most, either way.
        assert (alone[0] - loss[i]).abs() <= image.numel() * torch.finfo(torch.float32).eps * loss[i]
        assert torch.equal(torch.autograd.grad(alone.sum(), one)[0][0], gradient)
        assert torch.equal(denoise_step(guess[None], image[None], coefficients, patch_size, **options)[0], after)


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_sizes_are_the_dense_batch(impl: str) -> None:
    """With a seed too: an element's noise depends on its index in the buffer alone."""
    ragged, alpha, sigma = fresh(3, ((4, 6),) * 3)
    dense, seed = ragged.values.view(3, 3, 4, 6), torch.tensor(random.randrange(2**62), device=DEVICE)
    tokens = [patchify_noise(x, alpha, sigma, 2, seed=seed, impl=impl) for x in (ragged, dense)]
    assert torch.equal(tokens[0], tokens[1].flatten(0, 1))
    pairs = zip(tokens, (ragged, dense), strict=True)
    one, other = (diffusion_loss(t, x, sigma, alpha, 2, seed=seed, impl=impl) for t, x in pairs)
    # Sums of as many positive numbers in two orders: n·eps/2 of the sum at most, either way.
    assert ((one - other).abs() <= dense[0].numel() * torch.finfo(torch.float32).eps * one).all()


@pytest.mark.parametrize(("sizes", "patches"), [(((8, 16), (24, 8)), (1, 2, 4, 8)), (((3, 9), (15, 3)), (1, 3))])
def test_noise_depends_on_the_index_alone(sizes: Any, patches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise for every block size and patch arrangement, planes without quads too."""
    ragged, *_ = fresh(3, sizes)
    count, seed = len(sizes), torch.tensor(random.randrange(2**62), device=DEVICE)
    zero, one = torch.zeros(count, device=DEVICE), torch.ones(count, device=DEVICE)

    def noise(patch_size: int) -> Tensor:
        again = RaggedLatents(torch.zeros_like(ragged.values), 3, sizes)  # the tiles of the moment
        tokens = patchify_noise(again, zero, one, patch_size, seed=seed, impl="triton")
        values = torch.empty_like(ragged.values)
        values[ragged_latents.token_sources(again.layout, patch_size, len(tokens))] = tokens
        return values

    expected = noise(1)
    dense = torch.zeros(1, 1, 1, len(expected) + -len(expected) % 4, device=DEVICE)
    whole = patchify_noise(dense, zero[:1], one[:1], 1, seed=seed, impl="triton").flatten()
    assert torch.equal(expected, whole[: len(expected)])
    assert (expected - randn(expected.shape, seed)).abs().max() < 1e-5
    assert all(torch.equal(noise(patch_size), expected) for patch_size in patches)
    for tile in ((1, 64), (2, 16), (4, 8)):
        for module in (kernel, ragged_latents):
            monkeypatch.setattr(module, "tile_shape", lambda channels, tile=tile: tile)
        assert torch.equal(noise(patches[-1]), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl: str) -> None:
    ragged, alpha, sigma = fresh(2, ((4, 4), (2, 6)))
    seed, ops = torch.tensor(3, device=DEVICE), torch.ops.transfusion
    leaf = ragged.values.clone().requires_grad_()
    torch.library.opcheck(
        ops.patchify_noise.default, (leaf, alpha, sigma, None, seed, torch.float32, *ragged.layout, 2, impl)
    )
    prediction = torch.randn(7, 8, device=DEVICE, requires_grad=True)
    torch.library.opcheck(
        ops.diffusion_loss.default,
        (prediction, ragged.values, alpha, sigma, None, seed, alpha, *ragged.layout, 2, impl),
    )


def test_one_compilation_serves_every_layout() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def step(ragged: RaggedLatents, alpha: Tensor, sigma: Tensor, seed: Tensor) -> Tensor:
        tokens = patchify_noise(ragged, alpha, sigma, 2, seed=seed)
        return diffusion_loss(torch.sin(tokens), ragged, sigma, alpha, 2, seed=seed)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    rng = random.Random(5)
    for images in (2, 3, 5, 4, 3, 7):
        sizes = tuple((2 * rng.randint(1, 6), 2 * rng.randint(1, 6)) for _ in range(images))
        ragged, alpha, sigma = fresh(3, ((2, 2), *sizes))
        arguments = ragged, alpha, sigma, torch.tensor(rng.randrange(2**62), device=DEVICE)
        assert torch.equal(compiled(*arguments), step(*arguments))
    assert counter.frame_count <= 2


def test_latents_made_in_inference_mode_train() -> None:
    with torch.inference_mode():
        ragged, alpha, sigma = fresh()
    ragged, seed = ragged.with_values(ragged.values.clone().requires_grad_()), torch.tensor(5, device=DEVICE)
    tokens = patchify_noise(ragged, alpha.clone(), sigma.clone(), 2, seed=seed)
    loss = diffusion_loss(
        tokens, ragged.with_values(ragged.values.detach()), alpha.clone(), sigma.clone(), 2, seed=seed
    )
    loss.sum().backward()
    assert ragged.values.grad is not None and ragged.values.grad.isfinite().all()
    assert "sizes=((4, 6), (16, 20), (2, 2), (8, 4))" in repr(ragged)


def test_a_graph_makes_latents() -> None:
    def pixels(values: Tensor) -> Tensor:
        ragged = RaggedLatents(values, 1, ((2, 2), (1, 2)))
        return ragged.layout.planes[:, 1] + ragged.values.sum()

    values = torch.ones(6, device=DEVICE)
    assert torch.equal(torch.compile(pixels, fullgraph=True, backend="eager")(values), pixels(values))


def test_checkpointing_makes_the_same_noise_again() -> None:
    ragged, alpha, sigma = fresh()
    seed, weight = torch.tensor(11, device=DEVICE), torch.randn(12, 12, device=DEVICE)

    def step(weight: Tensor) -> Tensor:
        tokens = patchify_noise(ragged, alpha, sigma, 2, seed=seed)
        return diffusion_loss(tokens @ weight, ragged, sigma, alpha, 2, seed=seed).sum()

    grads = []
    for checkpointed in (False, True):
        leaf = weight.clone().requires_grad_()
        options = {"use_reentrant": False}
        loss = torch.utils.checkpoint.checkpoint(step, leaf, **options) if checkpointed else step(leaf)
        grads.append(torch.autograd.grad(loss, leaf)[0])
    assert torch.equal(*grads)


VALUES = torch.zeros(3 * 12)
BAD: list[tuple[Any, type[Exception], str]] = [
    (
        lambda: RaggedLatents(VALUES, 3, [(2, 3), (2, 4)]),
        ValueError,
        r"shape \(36,\); 2 images .* have \(42,\) elements",
    ),
    (lambda: RaggedLatents(VALUES, 3, [(0, 3), (3, 4)]), ValueError, "3 channels and 0x3 pixels has no elements"),
    (lambda: RaggedLatents.pack([]), ValueError, "at least one"),
    (lambda: RaggedLatents.pack([1]), TypeError, "an image must be a tensor"),
    (
        lambda: RaggedLatents.pack([torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, device="meta")]),
        ValueError,
        "on one device, got cpu and meta",
    ),
    (lambda: RaggedLatents(VALUES[:0], 0, []), ValueError, "channels=0 must be at least 1"),
    (
        lambda: RaggedLatents(VALUES, 3, [(3, 4)]).with_values(VALUES.to("meta")),
        ValueError,
        r"values are on meta, the sizes on .*; use to\('meta'\)",
    ),
    (lambda: RaggedLatents(VALUES.long(), 3, [(3, 4)]), TypeError, r"floating point, got torch\.int64"),
    (
        lambda: RaggedLatents.pack([torch.zeros(3, 2, 2), torch.zeros(1, 2, 2)]),
        ValueError,
        r"\[\(1, 2, 2\), \(3, 2, 2\)\]",
    ),
    (
        lambda: RaggedLatents(VALUES, 3, [(3, 4)]).with_values(torch.zeros(5)),
        ValueError,
        r"\(5,\), this layout takes \(36,\)",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=[row[2] for row in BAD])
def test_bad_images(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_bad_calls_name_the_image() -> None:
    ragged = RaggedLatents(torch.zeros(3 * 36), 3, [(4, 6), (3, 4)])
    weights, seed = torch.ones(2), torch.tensor(1)
    with pytest.raises(ValueError, match="latents of 3x4 do not divide into patches of 2x2"):
        patchify_noise(ragged, weights, weights, 2, seed=seed)
    with pytest.raises(ValueError, match=r"alpha must have one value per image, \(2,\), got \(3,\)"):
        patchify_noise(ragged, torch.ones(3), weights, 1, seed=seed)
    with pytest.raises(ValueError, match=r"prediction has shape \(4, 9, 3\).* make \(36, 3\)"):
        diffusion_loss(torch.zeros(4, 9, 3), ragged, weights, weights, 1, seed=seed)
    with pytest.raises(ValueError, match=r"noise has shape \(36,\), the latents \(108,\)"):
        patchify_noise(ragged, weights, weights, 1, noise=torch.zeros(36))
    with pytest.raises(TypeError, match=r"noise is RaggedLatents; pass the tensor, noise\.values"):
        patchify_noise(ragged, weights, weights, 1, noise=ragged)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_cuda_graph_replays_with_the_seed_of_the_moment() -> None:
    """Dense and ragged, noising, loss and gradient in one capture; the seed is read on the device."""
    ragged, alpha, sigma = fresh()
    dense, seed = torch.randn(4, 3, 8, 8, device=DEVICE), torch.tensor(3, device=DEVICE)

    def step() -> list[Tensor]:
        results = []
        for latents in (ragged, dense):
            tokens = patchify_noise(latents, alpha, sigma, 2, seed=seed, impl="triton")
            leaf = tokens.sin().requires_grad_()
            loss = diffusion_loss(leaf, latents, sigma, alpha, 2, seed=seed, weight=alpha, impl="triton")
            results += [tokens, loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]]
        return results

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        seed.add_(1)
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(captured, step(), strict=True))
