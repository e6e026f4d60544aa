"""Every launch that a table ships, as Triton specialises it: what ahead-of-time compilation compiles."""

from collections.abc import Iterator
from typing import Any

import torch

from transfusion.kernels import tuning
from transfusion.kernels.attention import kernel

# Beside each power of two a head dimension that it pads.
HEAD_DIMS = {16: (16,), 32: (32, 24), 64: (64, 40), 128: (128, 80), 256: (256, 160)}

_TYPES = {
    **dict.fromkeys(("p_lse", "p_grad_lse", "p_delta"), "*fp32"),
    **dict.fromkeys(("p_start", "p_end", "p_tiles"), "*i32"),
    **dict.fromkeys(("scale", "scale_log2"), "fp32"),
}

CompileCase = tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]], int, int]


def compile_cases(table: str) -> Iterator[CompileCase]:
    """(kernel, signature, constexprs, attrs, num_warps, num_stages) of each launch in the table of that name.

    16-bit launches are compiled for bfloat16. dk and dv are compiled twice, for grouped heads and for a group of 1,
    which Triton makes a constant.
    """
    for stage, size, padded, launch in tuning.launches(table, "attention"):
        for head_dim in HEAD_DIMS[padded]:
            dtype = torch.bfloat16 if size == 2 else torch.float32
            constants = kernel.constexprs(launch, head_dim, dtype)
            options = (launch.num_warps, launch.num_stages)
            if stage == "forward":
                yield _specialise(kernel.forward_kernel, dtype, constants, *options)
                yield _specialise(kernel.delta_kernel, dtype, kernel.delta_constexprs(head_dim), 4, 3)
            elif stage == "backward_query":
                yield _specialise(kernel.backward_query_kernel, dtype, constants, *options)
            else:
                yield _specialise(kernel.backward_key_kernel, dtype, constants, *options)
                yield _specialise(kernel.backward_key_kernel, dtype, {**constants, "group": 1}, *options)


def _specialise(
    jit: Any, dtype: torch.dtype, constants: dict[str, Any], num_warps: int, num_stages: int
) -> CompileCase:
    """Pointers and strides are multiples of 16, sizes are any."""
    element = "*bf16" if dtype == torch.bfloat16 else "*fp32"

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        return _TYPES.get(name, element if name.startswith("p_") else "i32")

    signature = {name: kind(name) for name in jit.arg_names}
    aligned = [i for i, name in enumerate(signature) if name.startswith("p_") or name.endswith(("_b", "_h", "_n"))]
    return jit, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}, num_warps, num_stages
