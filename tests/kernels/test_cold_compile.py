"""Each op under torch.compile(fullgraph=True) as the first thing a process does: nothing is loaded or chosen yet."""

import shutil
import subprocess
import sys

import pytest

# Inductor's CPU code needs a C++ compiler, which make test does not ask for.
BACKEND = "inductor" if shutil.which("g++") else "aot_eager"

PROGRAM = """
import torch
from transfusion.kernels import IntervalMask, denoise_step, diffusion_loss, patchify_noise, transfusion_attention
torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
x, q = torch.randn(2, 3, 8, 8), torch.randn(1, 2, 40, 16)
weight, seed = torch.rand(2), torch.tensor(5)
tokens, coefficients = torch.randn(2, 16, 12), torch.tensor([0.9, -0.2, 0.3, 0.1, 1.1, -0.4, 1.0])
mask = IntervalMask.from_spans(40, [(3, 20)], device=q.device)
calls = {{
    "transfusion_attention": lambda q: transfusion_attention(q, q, q, mask, impl="{impl}"),
    "patchify_noise": lambda x: patchify_noise(x, weight, weight, 2, seed=seed, impl="{impl}"),
    "diffusion_loss": lambda p: diffusion_loss(p, x, weight, weight, 2, seed=seed, impl="{impl}"),
    "denoise_step": lambda x: denoise_step(tokens, x, coefficients, 2, seed=seed, impl="{impl}"),
}}
leaf = {{"transfusion_attention": q, "diffusion_loss": tokens}}.get("{op}", x)
results = []
for run in (torch.compile(calls["{op}"], fullgraph=True, backend="{backend}"), calls["{op}"]):
    point = leaf.clone().requires_grad_("{op}" != "denoise_step")
    out = run(point)
    if point.requires_grad:
        out.sum().backward()
    results.append((out.detach(), point.grad if point.requires_grad else out))
for compiled, eager in zip(*results):
    torch.testing.assert_close(compiled, eager)
"""


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("op", ["transfusion_attention", "patchify_noise", "diffusion_loss", "denoise_step"])
def test_compile_is_the_first_call_of_a_fresh_process(op: str, impl: str) -> None:
    program = PROGRAM.format(op=op, impl=impl, backend=BACKEND)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
