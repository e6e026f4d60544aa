"""Every launch that a table ships, as Triton specialises it: what ahead-of-time compilation compiles."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from transfusion.kernels import tuning
from transfusion.kernels.attention.kernel import specialised_blocks
from transfusion.kernels.attention.kernel.blocks import constexprs
from transfusion.kernels.attention.kernel.gradients import (
    backward_key_kernel,
    backward_query_kernel,
    delta_constexprs,
    delta_kernel,
)
from transfusion.kernels.attention.kernel.online_softmax import combine_constexprs, combine_kernel, forward_kernel
from transfusion.kernels.attention.kernel.warp_specialised import specialised_forward_kernel
from transfusion.kernels.attention.kernel.warp_specialised_key import specialised_key_kernel
from transfusion.kernels.attention.kernel.warp_specialised_query import specialised_query_kernel

# Beside each power of two a head dimension that it pads; compiled in 16 bits.
HEAD_DIMS = {16: (16,), 32: (32, 24), 64: (64, 40), 128: (128, 80), 256: (256, 160)}
SPLITS = (16, 264)  # a few, and the most that an H200 takes: two programs of one head on each processor

_TYPES = {
    **dict.fromkeys(("p_lse", "p_lse2", "p_grad_lse", "p_delta", "p_parts", "p_part_lse"), "*fp32"),
    **dict.fromkeys(("p_intervals", "p_tiles", "p_next"), "*i32"),
    "scale": "fp32",
}

CompileCase = tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]], int, int]


def compile_cases(table: str) -> Iterator[CompileCase]:
    """(kernel, signature, constexprs, attrs, num_warps, num_stages) of each launch in the table of that name.

    16-bit launches are compiled for bfloat16; heads grouped and not, which Triton makes a constant; the forward alone
    and split, the decoding one split and with its heads packed. For Hopper the warp-specialised ones too, all that
    `tune` may choose.
    """
    if table == "sm_90":
        yield from _warp_specialised_cases()
    for stage, size, padded, shipped in tuning.launches(table, "attention"):
        launch = shipped.plain
        dtype = torch.bfloat16 if size == 2 else torch.float32
        for head_dim in HEAD_DIMS[padded] if size == 2 else (padded,):
            constants = constexprs(launch, head_dim, dtype)
            options = (dtype, launch.num_warps, launch.num_stages)
            if stage == "forward":
                for split in (False, True)[: 2 if head_dim == padded else 1]:
                    alone = constants | {"PACKED": False, "SPLIT": split, "packed": 1}
                    yield _specialise(forward_kernel, alone, *options)
                silent = dict.fromkeys(("p_grad_lse", "gl_b", "gl_h", "gl_n", *(() if size == 2 else ("p_lse2",))))
                yield _specialise(delta_kernel, delta_constexprs(head_dim) | silent, dtype, 4, 3)
                for splits in SPLITS:
                    yield _specialise(combine_kernel, combine_constexprs(head_dim, splits), dtype, 4, 3)
            elif stage == "decode":
                yield _specialise(forward_kernel, constants | {"PACKED": True, "SPLIT": True}, *options)
            elif stage == "backward_query":
                yield _specialise(backward_query_kernel, constants, *options)
            else:
                yield _specialise(backward_key_kernel, constants, *options)
                yield _specialise(backward_key_kernel, {**constants, "group": 1}, *options)


def _warp_specialised_cases() -> Iterator[CompileCase]:
    kernels = {
        "forward": specialised_forward_kernel,
        "backward_query": specialised_query_kernel,
        "backward_key": specialised_key_kernel,
    }
    for stage, by_head_dim in tuning.SPECIALISED.items():
        for padded, candidates in by_head_dim.items():
            for launch, head_dim in product(candidates, HEAD_DIMS[padded]):
                constants = specialised_blocks.constexprs(launch, head_dim)
                yield _specialise(kernels[stage], constants, torch.bfloat16, 4, 1)
                if stage == "backward_key":
                    yield _specialise(kernels[stage], {**constants, "group": 1}, torch.bfloat16, 4, 1)


def _specialise(
    jit: Any, constants: dict[str, Any], dtype: torch.dtype, num_warps: int, num_stages: int
) -> CompileCase:
    """Pointers and strides are multiples of 16, sizes are any. What a split forward writes is float32."""
    element = "*bf16" if dtype == torch.bfloat16 else "*fp32"

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name == "p_out" and constants.get("SPLIT"):
            return "*fp32"
        if name.endswith("_desc"):
            return _descriptor(name, element[1:], constants)
        return _TYPES.get(name, element if name.startswith("p_") else "i32")

    signature = {name: kind(name) for name in jit.arg_names}
    aligned = [i for i, name in enumerate(signature) if name.startswith("p_") or name.endswith(("_b", "_h", "_n"))]
    return jit, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}, num_warps, num_stages


def _descriptor(name: str, element: str, constants: dict[str, Any]) -> str:
    """The type of a descriptor as Triton writes it."""
    if name in ("i_desc", "lse_desc", "delta_desc"):
        kind, count = ("i32", 2 * constants["BLOCK_K"]) if name == "i_desc" else ("fp32", constants["BLOCK_Q"])
        return f"tensordesc<{kind}{[1, count]},{specialised_blocks.FLAT!r}>"
    rows = constants["BLOCK_Q" if name in ("q_desc", "go_desc") else "BLOCK_K"]
    return f"tensordesc<{element}{[1, 1, rows, constants['BLOCK_D']]},{specialised_blocks.SWIZZLED_BLOCK!r}>"
