"""What the warp-specialised kernels share: which block a program takes, how tiles are copied in and rows stored.

Names as in `blocks.py`. An item is a block of a head. A program takes the item of its number first and then, when its
producer has begun all copies of one, the next that no program has taken: p_next counts them. `work` says where an item
lies: how many there are; heads of a row of the batch; their order: blocks of a head, heads of the batch, heads of a
section; and the lines of tiles, with their strides of the batch and of lines.
"""

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from transfusion.kernels import tuning
from transfusion.kernels.attention.kernel.blocks import FULL_RUNS, MASKED_RUNS

ROWS = gl.constexpr(64)  # of a consumer
# Of what the accelerator copies: a block of (B, H, N, D), and one of numbers of 32 bits.
SWIZZLED_BLOCK = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
FLAT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32)
SECTION_BYTES = 2**24  # of what programs read at a time: it stays in the L2 cache


@gluon.jit
def place(item, work, LAST_FIRST: gl.constexpr):
    """item -> head of the batch, block, its line of tiles. Sections of heads in turn; in each the longest blocks first.

    Those are the last ones of queries, which see the most keys, and the first ones of keys.
    """
    _items, heads, order, lines = work
    blocks, all_heads, section = order
    p_tiles, tiles_b, tiles_n = lines
    begin = item // (blocks * section) * section
    width = gl.minimum(section, all_heads - begin)
    within = item - begin * blocks
    head, block = begin + within % width, within // width
    if LAST_FIRST:
        block = blocks - 1 - block
    return head, block, p_tiles + head // heads * tiles_b + block * tiles_n


# ------------------------------------------------------------- who takes which item


@gluon.jit
def allocate_feed():
    """Where the producer tells the consumers of an item, and two barriers: it is told, both have read it."""
    numbers = gl.allocate_shared_memory(gl.int32, [3, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=1)
    mbarrier.init(bars.index(1), count=2)
    return numbers, bars


@gluon.jit
def following(p_next):
    """The item after the last that any program took: whoever is done takes it, so that all end together.

    In turns fixed beforehand a program has blocks of about one rank of every section: of 8192 causal tokens and 16
    heads of 128 lanes the slowest of 132 would have 1.41 times the average's tiles, by counting.
    """
    return gl.num_programs(0) + gl.atomic_add(p_next, 1, sem="relaxed")


@gluon.jit
def tell(item, count, feed, work, LAST_FIRST: gl.constexpr):
    """Tells the consumers their count-th item, or that there is none left -> its head, block and line of tiles."""
    numbers, bars = feed
    head, block, line = place(gl.minimum(item, work[0] - 1), work, LAST_FIRST)
    masked_tiles, tiles = gl.load(line + 3), gl.load(line + 2)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    mbarrier.wait(bars.index(1), count & 1 ^ 1)
    numbers.index(0).store(gl.full([1], item, gl.int32, ONE))
    numbers.index(1).store(gl.full([1], masked_tiles, gl.int32, ONE))
    numbers.index(2).store(gl.full([1], tiles, gl.int32, ONE))
    mbarrier.arrive(bars.index(0))
    return head, block, line


@gluon.jit
def told(count, feed):
    """The count-th item, its masked tiles and its tiles in all."""
    numbers, bars = feed
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(bars.index(0), count & 1)
    item = gl.max(numbers.index(0).load(ONE), 0)
    masked_tiles = gl.max(numbers.index(1).load(ONE), 0)
    tiles = gl.max(numbers.index(2).load(ONE), 0)
    mbarrier.arrive(bars.index(1))
    return item, masked_tiles, tiles


# ------------------------------------------------------------- what they read and write


@gluon.constexpr_function
def pairs(BLOCK_K):
    """start and end of the columns that a thread has of its scores: two neighbours of every eight, 16 bytes each."""
    octets = [[1 << bit, 0] for bit in range(3, BLOCK_K.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [1, 0], *octets],
        lane_bases=[[2, 0], [4, 0], [0, 0], [0, 0], [0, 0]],
        warp_bases=[[0, 0], [0, 0]],
        block_bases=[],
        shape=[BLOCK_K, 2],
    )


@gluon.jit
def column_intervals(place_of_pairs, S: gl.constexpr):
    """start, end of the keys that are the columns of scores of layout S, from a place of (1, 2·BLOCK_K) int32."""
    BLOCK_K: gl.constexpr = place_of_pairs.shape[1] // 2
    start, end = gl.split(place_of_pairs.reshape([BLOCK_K, 2]).load(pairs(BLOCK_K)))
    start = gl.convert_layout(start, gl.SliceLayout(0, S), assert_trivial=True)
    end = gl.convert_layout(end, gl.SliceLayout(0, S), assert_trivial=True)
    return gl.expand_dims(start, 0), gl.expand_dims(end, 0)


@gluon.jit
def store_rows(p_base, stride, first_row, num_rows, value, HEAD_DIM: gl.constexpr):
    """Writes ROWS rows of 16 bits from first_row on, 16 bytes a thread, but none past num_rows and no padded lane."""
    BLOCK_D: gl.constexpr = value.shape[1]
    COALESCED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    value = gl.convert_layout(value, COALESCED)
    rows = gl.expand_dims(first_row + gl.arange(0, ROWS, gl.SliceLayout(1, COALESCED)), 1)
    lanes = gl.expand_dims(gl.arange(0, BLOCK_D, gl.SliceLayout(0, COALESCED)), 0)
    offsets = gl.cast(rows, gl.int64) * stride + lanes
    gl.store(p_base + offsets, value, mask=(rows < num_rows) & (lanes < HEAD_DIM))


# ------------------------------------------------------------- the gradients' shared memory and producer


@gluon.jit
def allocate(
    dtype: gl.constexpr, OWNED: gl.constexpr, STREAMED: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr
):
    """Two rings of PLACES tiles of OWNED rows, two of STAGES tiles of STREAMED rows, barriers, and what tells of items.

    block_bars are those of the owned tiles, bars those of the streamed: first the ones that say full, then free. With
    two places the next block's tiles arrive while this one is computed; at 128 lanes there is room for one.
    """
    PLACES: gl.constexpr = 2 if BLOCK_D == 64 else 1
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    first = gl.allocate_shared_memory(dtype, [PLACES, OWNED, BLOCK_D], SWIZZLED)
    second = gl.allocate_shared_memory(dtype, [PLACES, OWNED, BLOCK_D], SWIZZLED)
    first_ring = gl.allocate_shared_memory(dtype, [STAGES, STREAMED, BLOCK_D], SWIZZLED)
    second_ring = gl.allocate_shared_memory(dtype, [STAGES, STREAMED, BLOCK_D], SWIZZLED)
    block_bars = gl.allocate_shared_memory(gl.int64, [2 * PLACES, 1], mbarrier.MBarrierLayout())
    bars = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    for at in gl.static_range(PLACES):
        mbarrier.init(block_bars.index(at), count=1)
        mbarrier.init(block_bars.index(PLACES + at), count=2)
    for at in gl.static_range(STAGES):
        mbarrier.init(bars.index(at), count=1)
        mbarrier.init(bars.index(STAGES + at), count=2)
    feed = allocate_feed()
    fence_async_shared()  # the copies signal what these instructions wrote
    return (first, second), first_ring, second_ring, block_bars, bars, feed


@gluon.jit
def produce(owned, streamed, tiles, rings, block_bars, bars, feed, work, p_next, group, own_mask, KEYS: gl.constexpr):
    """Copies the two tiles that each block owns, then what is streamed past them: masked runs, then full ones.

    KEYS: k and v are owned; q, grad_out, lse and delta are streamed, of each head of the group. Else q and grad_out are
    owned; k, v and intervals are streamed.
    """
    items, heads, _order, _lines = work
    PLACES: gl.constexpr = tiles[0].shape[0]
    OWNED: gl.constexpr = tiles[0].shape[1]
    BLOCK_D: gl.constexpr = tiles[0].shape[2]
    STAGES: gl.constexpr = rings[0].shape[0]
    STREAMED: gl.constexpr = rings[0].shape[1]
    n = 0  # tiles so far
    count = 0  # and blocks
    item = gl.program_id(0)
    while item < items:
        head, block, line = tell(item, count, feed, work, not KEYS)
        b, h = head // heads, head % heads
        held = count % PLACES
        mbarrier.wait(block_bars.index(PLACES + held), count // PLACES & 1 ^ 1)
        full = block_bars.index(held)
        mbarrier.expect(full, 4 * OWNED * BLOCK_D)
        _copy_rows(owned[0], b, h, block * OWNED, full, tiles[0].index(held))
        _copy_rows(owned[1], b, h, block * OWNED, full, tiles[1].index(held))
        after = -1
        for member in range(group if KEYS else 1):
            other = h * group + member if KEYS else h // group
            for kind in gl.static_range(2):
                p_runs = line + (FULL_RUNS if kind else MASKED_RUNS)
                for run in range(gl.load(line + kind)):
                    for tile in range(gl.load(p_runs + 2 * run), gl.load(p_runs + 2 * run + 1)):
                        at, first = n % STAGES, tile * STREAMED
                        mbarrier.wait(bars.index(STAGES + at), n // STAGES & 1 ^ 1)
                        full = bars.index(at)
                        mbarrier.expect(full, 4 * STREAMED * BLOCK_D + 8 * STREAMED)
                        _copy_rows(streamed[0], b, other, first, full, rings[0].index(at))
                        _copy_rows(streamed[1], b, other, first, full, rings[1].index(at))
                        if KEYS:
                            row = head * group + member
                            tma.async_copy_global_to_shared(streamed[2], [row, first], full, rings[2].index(at))
                            tma.async_copy_global_to_shared(streamed[3], [row, first], full, rings[3].index(at))
                        else:
                            row = b * own_mask
                            tma.async_copy_global_to_shared(streamed[2], [row, 2 * first], full, rings[2].index(at))
                        if PLACES == 2 and after < 0:  # here: a counter in memory answers late, what follows it waits
                            after = following(p_next)
                        n += 1
        if after < 0:
            after = following(p_next)
        item = after
        count += 1
    tell(item, count, feed, work, not KEYS)


@gluon.jit
def _copy_rows(descriptor, b, h, first, full, to):
    """Begins the copy of the rows of head h of batch b from `first` on to a place; `full` counts its bytes."""
    COUNT: gl.constexpr = to.shape[0]
    BLOCK_D: gl.constexpr = to.shape[1]
    tma.async_copy_global_to_shared(descriptor, [b, h, first, 0], full, to.reshape([1, 1, COUNT, BLOCK_D]))


@gluon.jit
def products(rows, columns, S: gl.constexpr):
    """rows columnsᵀ of two tiles in shared memory, issued."""
    COLUMNS: gl.constexpr = columns.shape[0]
    zeros = gl.zeros([ROWS, COLUMNS], gl.float32, S)
    return warpgroup_mma(rows, columns.permute((1, 0)), zeros, use_acc=False, is_async=True)


# ------------------------------------------------------------- the host's part


def constexprs(launch: tuning.Launch, head_dim: int) -> dict[str, int]:
    """What a kernel is specialised on."""
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": tuning.padded_head_dim(head_dim),
        "BLOCK_Q": launch.block_q,
        "BLOCK_K": launch.block_k,
        "STAGES": launch.num_stages,
    }


def no_items(device: torch.device) -> Tensor:
    """What counts the items that programs took after their first: (1,) int32, of one launch."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def describe(tensor: Tensor, rows: int) -> TensorDescriptor:
    """A (B, H, N, D) tensor in blocks of `rows` and all lanes; copied where its address or strides are not fit for it.

    An address and strides must be multiples of 16 bytes; those of expanded dimensions are not above 0.
    """

    def strides(tensor: Tensor) -> list[int]:  # that of a dimension of size 1 says nothing: a row's length will do
        pairs = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
        return [*(stride if size > 1 else tensor.shape[3] for size, stride in pairs), 1]

    aligned = tensor.data_ptr() % 16 == 0
    known = _DESCRIBED.get((tensor.shape, tensor.stride(), tensor.dtype, rows)) if aligned else None
    if known is not None:
        return _of(tensor, known)
    if not aligned or any(stride % 8 or stride <= 0 for stride in strides(tensor)[:3]):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    block = [1, 1, rows, tuning.padded_head_dim(tensor.shape[3])]
    return _new(tensor, rows, strides(tensor), block, SWIZZLED_BLOCK)


def describe_numbers(tensor: Tensor, count: int) -> TensorDescriptor:
    """Numbers of 32 bits in blocks of `count` of the last dimension; copied where rows are not multiples of 16 bytes.

    What is copied is padded by 0: an interval from 0 to 0 is seen by no query.
    """
    rows = tensor.flatten(0, -2).contiguous()
    if rows.shape[1] % 4 or rows.data_ptr() % 16:
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 4))
    known = _DESCRIBED.get((rows.shape, rows.stride(), rows.dtype, count))
    return _of(rows, known) if known is not None else _new(rows, count, list(rows.stride()), [1, count], FLAT)


# Descriptors of no tensor, by shape, strides, dtype and rows: they are checked where they are made, once.
_DESCRIBED: dict[tuple[Any, ...], TensorDescriptor] = {}
_LIMIT = 4096


def _new(tensor: Tensor, rows: int, strides: list[int], block: list[int], layout: Any) -> TensorDescriptor:
    descriptor = TensorDescriptor(tensor, list(tensor.shape), strides, block, layout)
    if len(_DESCRIBED) >= _LIMIT:
        _DESCRIBED.clear()
    _DESCRIBED[tensor.shape, tensor.stride(), tensor.dtype, rows] = _of(None, descriptor)
    return descriptor


def _of(tensor: Tensor | None, known: TensorDescriptor) -> TensorDescriptor:
    """`known` of another tensor, which must be aligned as that was."""
    descriptor = object.__new__(TensorDescriptor)
    vars(descriptor).update(vars(known), base=tensor)
    return descriptor
