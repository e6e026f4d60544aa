"""QK-norm, and the dtypes that are promised."""

from dataclasses import replace

import tiny
import torch

from transfusion.kernels.testing import judge


def test_qk_norm_makes_scores_independent_of_the_projection_s_scale() -> None:
    batch = tiny.Batches().batch(0)
    patches = torch.randn(batch.num_images, 4, 12)
    for qk_norm in (True, False):
        model = tiny.model(replace(tiny.CONFIG, qk_norm=qk_norm, norm_eps=0.0)).double()
        states = []
        for factor in (1.0, 16.0):  # a power of two: exact
            with torch.no_grad():
                for block in model.transformer.blocks:
                    block.attention.qkv.weight[: 2 * 32] *= factor
            states.append(model.hidden(batch, patches.double(), torch.tensor([10] * batch.num_images)))
        assert torch.equal(*states) == qk_norm
        names = [name for name, _ in model.named_parameters() if "q_norm" in name or "k_norm" in name]
        assert len(names) == (4 if qk_norm else 0)


def test_every_parameter_of_every_option_learns() -> None:
    model = tiny.model(replace(tiny.CONFIG, image_positions="grid", qk_norm=True, kv_heads=1, ffn_width=40))
    model(tiny.Batches().batch(0)).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert model.transformer.blocks[0].ffn.down.weight.shape == (32, 40)


def test_the_residual_stream_norms_and_losses_are_float32_under_autocast() -> None:
    model, batch = tiny.model(replace(tiny.CONFIG, qk_norm=True)), tiny.Batches().batch(0)
    seen: dict[str, set[torch.dtype]] = {"residual": set(), "norm": set(), "matrix": set()}
    for module in model.transformer.modules():
        kind = {"Block": "residual", "RMSNorm": "norm", "Linear": "matrix"}.get(type(module).__name__)
        if kind:
            module.register_forward_hook(lambda _, inputs, output, kind=kind: seen[kind].add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch)
    losses.total.backward()
    assert seen == {"residual": {torch.float32}, "norm": {torch.float32}, "matrix": {torch.bfloat16}}
    assert {loss.dtype for loss in losses} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_a_norm_of_bfloat16_is_rounded_once() -> None:
    """Computed in float32: as close to float64 as the rounding of the result lets it be."""
    x = torch.randn(2, 5, 4, 16).bfloat16()
    norm = torch.nn.RMSNorm(16, eps=1e-5).bfloat16()
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5)
    verdict = judge(norm(x), exact.bfloat16(), exact, factor=1.0)
    assert verdict.passed, verdict
