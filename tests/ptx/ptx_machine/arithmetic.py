"""What instructions on registers compute, all lanes at a time: templates of numpy expressions, and what those call.

A register of 16, 32 or 64 bits is read as unsigned "u", signed "i" or float "f"; a predicate "p" is bool.
"""

from typing import Any

import numpy as np

Lanes = np.ndarray[Any, Any]
DTYPES = {
    (8, "u"): np.uint8,
    (8, "i"): np.int8,
    (16, "u"): np.uint16,
    (16, "i"): np.int16,
    (16, "f"): np.float16,
    (32, "u"): np.uint32,
    (32, "i"): np.int32,
    (32, "f"): np.float32,
    (64, "u"): np.uint64,
    (64, "i"): np.int64,
    (1, "p"): np.bool_,
}

# By the first word of an opcode; {T} is the type of the result, {W} one twice as wide.
BINARY = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} ^ {1}",
    "shl": "{0} << {1}",
    "shr": "{0} >> {1}",
}
FLOAT = {
    "mul": "{0} * {1}",
    "fma": "fma({0}, {1}, {2})",
    "max": "np.fmax({0}, {1})",  # of a number and NaN the number
    "min": "np.fmin({0}, {1})",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "abs": "np.abs({0})",
    "sqrt": "np.sqrt({0})",
    # What a device approximates, off by as many units in the last place as are assumed of it; no device was asked.
    "div.full": "near({0} / {1}, {0}, 2)",
    "ex2.approx": "near(np.exp2({0}), {0}, 2)",
    "sqrt.approx": "near(np.sqrt({0}), {0}, 1)",
}
INTEGER = {
    "mul.lo": "{0} * {1}",
    "mul.hi": "(({0}.astype({W}) * {1}) >> {bits}).astype({T})",
    "mul.wide": "{0}.astype({T}) * {1}",
    "mad.lo": "{0} * {1} + {2}",
    "mad.wide": "{0}.astype({T}) * {1} + {2}",
    "max": "np.maximum({0}, {1})",
    "min": "np.minimum({0}, {1})",
    "div": "quotient({0}, {1})",
    "rem": "remainder({0}, {1})",
    "neg": "-{0}",
    "not": "~{0}",
    "abs": "np.abs({0})",
    "popc": "np.bitwise_count({0}).astype({T})",
    "bfe": "field({0}, {1}, {2})",
}
# "ne" of floats is false of NaN, and not this; "neu" is true of it, as numpy's is
COMPARISONS = {"eq": "==", "ne": "!=", "neu": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


def fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """a·b + c, rounded once but for halves of a bit of float64."""
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)


def near(result: Lanes, source: Lanes, units: int) -> Lanes:
    """`result` off by up to so many units in the last place: how far, the bits of `source` say, alike at every call."""
    mixed = (np.asarray(source).view(np.uint32) * np.uint32(0x9E3779B1)) >> np.uint32(16)
    off = (mixed / 32768.0 - 1) * (units * 2.0**-23)
    return np.where(np.asarray(source) == 0, result, result * (1 + off)).astype(np.float32)


def parts(register: Lanes, dtype: Any) -> Lanes:
    """The two halves of 32 bits as numbers of 16, side by side."""
    return np.atleast_1d(register)[:, None].view(dtype)


def whole(numbers: Lanes) -> Lanes:
    """Back to 32 bits."""
    return np.ascontiguousarray(numbers).view(np.uint32)[:, 0]


def quotient(a: Lanes, b: Lanes) -> Lanes:
    """Towards zero; what an inactive lane divides by is anything."""
    b = np.where(b == 0, b.dtype.type(1), b) if isinstance(b, np.ndarray) else b
    down = a // b
    return down + ((down < 0) & (down * b != a)) if a.dtype.kind == "i" else down


def remainder(a: Lanes, b: Lanes) -> Lanes:
    """Of the sign of a."""
    return np.fmod(a, np.where(b == 0, b.dtype.type(1), b))


def field(a: Lanes, position: int, length: int) -> Lanes:
    """`length` bits from `position` on, with the sign of the uppermost where a is signed."""
    position, length = int(position), int(length)
    bits = 8 * a.dtype.itemsize
    kind = a.dtype.type
    return (a << kind(bits - position - length)) >> kind(bits - length)


def bf16(x: Lanes) -> Lanes:
    """float32 -> the upper 16 bits, to the nearest, ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    nan = np.isnan(x)
    return (np.where(nan, np.uint32(0x7FFF), rounded) if nan.any() else rounded).astype(np.uint16)


def from_bf16(x: Lanes) -> Lanes:
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def fp16(x: Lanes) -> Lanes:
    return x.astype(np.float16).view(np.uint16)


def pair(low: Lanes, high: Lanes) -> Lanes:
    """Two registers in one twice as wide, the first in the lower bits."""
    low, high = np.broadcast_arrays(low, high)
    return np.stack([low, high], axis=-1).view(f"u{2 * low.itemsize}")[:, 0]


def halves(x: Lanes) -> Lanes:
    """The inverse of `pair`."""
    return np.ascontiguousarray(x)[:, None].view(f"u{x.itemsize // 2}").T.copy()


def to_integer(x: Lanes, dtype: Any) -> Lanes:
    """Towards zero, saturating, NaN to 0."""
    limits = np.iinfo(dtype)
    return np.clip(np.nan_to_num(np.trunc(x.astype(np.float64))), limits.min, limits.max).astype(dtype)


def permute(a: Lanes, b: Lanes, selector: Lanes) -> Lanes:
    """prmt.b32: each nibble of the selector names one of eight bytes, or spreads its sign."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    octets = np.stack([a, b], -1).view(np.uint8)
    picks = (selector[:, None] >> np.arange(0, 16, 4, np.uint32)) & np.uint32(15)
    chosen = np.take_along_axis(octets, (picks & np.uint32(7)).astype(np.int64), 1)
    signs = np.where(chosen >> np.uint8(7), np.uint8(255), np.uint8(0))
    return np.where(picks & np.uint32(8), signs, chosen).view(np.uint32)[:, 0]


def shuffle(kind: str, x: Lanes, offset: Any) -> Lanes:
    """shfl.sync of whole warps."""
    lanes = np.arange(x.size)
    within, first = lanes % 32, lanes - lanes % 32
    offset = np.asarray(offset).astype(np.int64)
    if kind == "idx":
        source = offset + 0 * lanes
    elif kind == "bfly":
        source = within ^ offset
    else:
        source = within - offset if kind == "up" else within + offset
    return x[np.where((source < 0) | (source > 31), within, source) + first]


def reduce(function: str, x: Lanes) -> Lanes:
    """redux.sync: the sum, min or max of each warp, to all of its lanes."""
    warps = x.reshape(-1, 32)
    result = {"add": np.add, "min": np.minimum, "max": np.maximum}[function].reduce(warps, axis=1, dtype=x.dtype)
    return np.repeat(result, 32)
