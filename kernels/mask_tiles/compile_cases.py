"""The launches that make tiles, as Triton specialises them, for ahead-of-time compilation."""

from collections.abc import Iterator
from typing import Any

from transfusion.kernels import tuning
from transfusion.kernels.mask_tiles.kernel import CHUNK, key_extremes_kernel, key_tiles_kernel, query_tiles_kernel

CompileCase = tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]], int]


def compile_cases(table: str) -> Iterator[CompileCase]:
    """(kernel, signature, constexprs, attrs, num_warps) for each size of tile that the table's launches ask for."""
    rows = tuning.launches(table, "attention")
    for block_k in sorted({launch.block_k for stage, *_, launch in rows if stage != "backward_key"}):
        yield _specialise(key_extremes_kernel, {"BLOCK_K": block_k})
    for block_q in sorted({launch.block_q for stage, *_, launch in rows if stage != "backward_key"}):
        yield _specialise(query_tiles_kernel, {"BLOCK_Q": block_q, "CHUNK": CHUNK})
    for block_q, block_k in sorted({launch[:2] for stage, *_, launch in rows if stage == "backward_key"}):
        yield _specialise(key_tiles_kernel, {"BLOCK_Q": block_q, "BLOCK_K": block_k})


def _specialise(jit: Any, constants: dict[str, int]) -> CompileCase:
    """Pointers are multiples of 16, sizes are any."""

    def kind(name: str) -> str:
        return "constexpr" if name in constants else "*i32" if name.startswith("p_") else "i32"

    signature = {name: kind(name) for name in jit.arg_names}
    aligned = [i for i, name in enumerate(signature) if name.startswith("p_")]
    return jit, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}, 1
