"""Tensor core operands: which lane has which element, and where wgmma's descriptors say that a matrix lies.

A fragment of 16 × 16 (A) gives lane 4g + t the pairs (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); accumulators
of 16 × 8 its first two. From the PTX manual: "Matrix Fragments for mma.m16n8k16", "Matrix Descriptor Format".
"""

from functools import lru_cache
from typing import Any

import numpy as np

from ptx_machine.arithmetic import from_bf16
from ptx_machine.memory import Fault

SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}  # of the descriptor's field: bytes


def numbers(bits: Any, kind: str) -> Any:
    """16-bit patterns as float32."""
    if kind == "bf16":
        return from_bf16(bits)
    return bits.view(np.float16).astype(np.float32)


def a_fragment(registers: Any, kind: str) -> Any:
    """Four registers of two elements -> (warps, 16, 16)."""
    parts = np.stack(registers).view(np.uint16).reshape(2, 2, -1, 8, 4, 2)  # half of k, of rows, warp, group, thread
    return numbers(parts.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 16), kind)


def b_fragment(registers: Any, kind: str) -> Any:
    """Two registers of two elements -> (warps, 16, 8)."""
    parts = np.stack(registers).view(np.uint16).reshape(2, -1, 8, 4, 2)  # half of k, warp, group, thread
    return numbers(parts.transpose(1, 0, 3, 4, 2).reshape(-1, 16, 8), kind)


def spread(matrix: Any) -> Any:
    """(warps, 16, N) -> (N / 2, lanes): the accumulators."""
    parts = matrix.reshape(-1, 2, 8, matrix.shape[2] // 8, 4, 2)  # warp, half of rows, group, octet, thread, element
    return parts.transpose(3, 1, 5, 0, 2, 4).reshape(matrix.shape[2] // 2, -1)


def gather(registers: Any) -> Any:
    """The inverse of `spread`."""
    parts = np.stack(registers)
    parts = parts.reshape(len(parts) // 4, 2, 2, -1, 8, 4)
    return parts.transpose(3, 1, 4, 0, 5, 2).reshape(parts.shape[3], 16, -1)


def mma(a: Any, b: Any, c: Any, kind: str) -> Any:
    """mma.sync.m16n8k16 of each warp: a b + c, of float32."""
    return spread(a_fragment(a, kind) @ b_fragment(b, kind) + gather(c))


@lru_cache(maxsize=4096)
def operand_offsets(descriptor: int, rows: int, rows_last: bool, base: int) -> Any:
    """(rows, 16) byte offsets in shared memory of an operand's tile: rows of A, or columns of B, by 16 of K.

    rows_last: the elements along the rows are neighbours in memory ("MN-major"), else those along K.
    """
    start = (descriptor & 0x3FFF) << 4
    leading, stride = (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    width = SWIZZLES[descriptor >> 62]
    if descriptor >> 49 & 7:
        raise Fault("a matrix descriptor with a base offset")
    row, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if rows_last:
        if width:
            run = width // 2
            offset = row % run * 2 + row // run * leading + k % 8 * width + k // 8 * stride
        else:
            offset = row % 8 * 2 + row // 8 * stride + k % 8 * 16 + k // 8 * leading
    elif width:
        offset = k * 2 + row % 8 * width + row // 8 * stride
    else:
        offset = k % 8 * 2 + k // 8 * leading + row % 8 * 16 + row // 8 * stride
    address = start + offset
    if width:
        address = address ^ ((address >> 7 & (width // 16 - 1)) << 4)
    return address - base


def operand(shared: Any, descriptor: Any, rows: int, rows_last: int, kind: str) -> Any:
    """(rows, 16) of float32."""
    if (descriptor != descriptor[0]).any():
        raise Fault("lanes of a warp group have different matrix descriptors")
    offsets = operand_offsets(int(descriptor[0]), rows, bool(rows_last), shared.BASE)
    return numbers(shared.read_by_proxy(offsets), kind)


def multiply(
    shared: Any, first: int, a: Any, b: Any, columns: int, kind: str, a_rows_last: int, b_rows_last: int
) -> Any:
    """wgmma's product (warps, 16, columns) of the warps from `first` on: a in registers or in shared memory, b there.

    A group of four warps has 64 rows; a warp alone computes its 16 of them.
    """
    lanes = b.size
    results = []
    for begin in range(0, lanes, 128):
        group = slice(begin, begin + 128)
        if isinstance(a, tuple):
            rows = a_fragment([register[group] for register in a], kind)
        else:
            rows = operand(shared, a[group], 64, a_rows_last, kind).reshape(4, 16, 16)
            rows = rows if lanes > 32 else rows[first % 4][None]
        results.append(rows @ operand(shared, b[group], columns, b_rows_last, kind).T)
    return np.concatenate(results)
