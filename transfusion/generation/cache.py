"""Keys and values of B rows of different lengths, and the windows through which new tokens enter.

    bytes = 2·layers·B·H_kv·M·D·itemsize      at most twice that while a call copies rows, to split or to stack them

A window writes its tokens' keys and values behind each row's length and does not move the length: a denoising step
overwrites what the previous step wrote. `KVCache.advance` commits what is to stay.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transfusion.kernels import IntervalMask, transfusion_attention
from transfusion.kernels.dispatch import autocast_dtype
from transfusion.model import Transfusion


class KVCache:
    """B rows of at most M tokens each, in buffers that never move, as a captured graph needs.

    keys, values  (layers, B, H_kv, M, D)   zero where nothing is written yet
    lengths       (B,) int64                committed tokens of each row, on the device
    used          B ints                    the same, known on the host
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (layers, rows, kv_heads, capacity, head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.used = [0] * rows

    @staticmethod
    def of(model: Transfusion, rows: int, capacity: int) -> "KVCache":
        """An empty cache for `model`: on its device, in its dtype or, if it is on, autocast's."""
        config, weight = model.config, model.embedding.weight
        dtype = autocast_dtype(weight.device) or weight.dtype
        sizes = (config.layers, rows, config.num_kv_heads, capacity, config.head_dim)
        return KVCache(*sizes, dtype=dtype, device=weight.device)

    @property
    def capacity(self) -> int:
        """M."""
        return self.keys.shape[3]

    @property
    def is_static(self) -> bool:
        """Whether one step serves every length: a captured CUDA graph, whose kernels skip what no query sees."""
        return self.keys.device.type == "cuda"

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return self.keys.nbytes + self.values.nbytes

    def advance(self, counts: Sequence[int]) -> None:
        """Commits the first counts[b] of the tokens that were written behind row b's length."""
        self.used = [used + count for used, count in zip(self.used, counts, strict=True)]
        if len(set(counts)) == 1:
            self.lengths += counts[0]  # no copy from the host
        else:
            self.lengths += torch.tensor(counts, device=self.lengths.device)

    def take(self, rows: Sequence[int]) -> "KVCache":
        """A new cache with a copy of these rows, in this order; a row may be taken more than once."""
        return KVCache.stack([self._copy([row]) for row in rows]) if len(set(rows)) < len(rows) else self._copy(rows)

    def _copy(self, rows: Sequence[int]) -> "KVCache":
        copy = self._like(len(rows), self.capacity)
        copy.used = [self.used[row] for row in rows]
        index, part = torch.tensor(rows, device=self.lengths.device), max(copy.used)
        copy.lengths.copy_(self.lengths[index])
        for mine, its in ((self.keys, copy.keys), (self.values, copy.values)):
            its[:, :, :, :part] = mine[:, :, :, :part].index_select(1, index)
        return copy

    def _like(self, rows: int, capacity: int) -> "KVCache":
        layers, _, kv_heads, _, head_dim = self.keys.shape
        sizes = (layers, rows, kv_heads, capacity, head_dim)
        return KVCache(*sizes, dtype=self.keys.dtype, device=self.keys.device)

    @staticmethod
    def stack(caches: Sequence["KVCache"]) -> "KVCache":
        """The rows of several caches as one, its capacity the largest of theirs."""
        whole = caches[0]._like(sum(len(c.used) for c in caches), max(c.capacity for c in caches))
        whole.used = [used for c in caches for used in c.used]
        torch.cat([c.lengths for c in caches], out=whole.lengths)
        first = 0
        for cache in caches:
            last, part = first + len(cache.used), max(cache.used)
            for its, mine in ((cache.keys, whole.keys), (cache.values, whole.values)):
                mine[:, first:last, :, :part] = its[:, :, :, :part]
            first = last
        return whole

    def check_room(self, tokens: int) -> None:
        """Raises `ValueError` unless every row has room for so many more tokens."""
        fullest = max(self.used)
        if fullest + tokens > self.capacity:
            raise ValueError(
                f"the cache is full: row {self.used.index(fullest)} holds {fullest} tokens, and {tokens} more do not "
                f"fit its capacity of {self.capacity}; make it larger, or generate less"
            )

    def reach(self, tokens: int) -> int:
        """How many keys attention looks at when every row gets so many more tokens: PyTorch's own, under a dense
        mask, computes them all, so it is cut at the used part; off a CPU not anew for each token."""
        if self.is_static:
            return self.capacity
        step = 1 if self.keys.device.type == "cpu" else 64
        return min(self.capacity, -(-(max(self.used) + tokens) // step) * step)

    def window(self, new: IntervalMask) -> "Window":
        """Room for N more tokens of every row, `new` the mask among them. Raises `ValueError` where it is full."""
        self.check_room(new.num_queries)
        return Window(self, new)


class Window:
    """N new tokens of each row: their places, and attention over the cache and themselves. Reusable until `advance`.

    positions (B, N) int64; new: the mask among the tokens; mask: the same over the cached keys too.
    """

    def __init__(self, cache: KVCache, new: IntervalMask) -> None:
        self.cache, self.new = cache, new
        device = cache.lengths.device
        self.positions = cache.lengths[:, None] + torch.arange(new.num_queries, device=device)
        self._keys = cache.reach(new.num_queries)
        self._places: tuple[Any, Any] = torch.arange(len(cache.used), device=device)[:, None], self.positions
        if not cache.is_static and len(set(cache.used)) == 1:
            self._places = slice(None), slice(cache.used[0], cache.used[0] + new.num_queries)
        self.mask = IntervalMask.continuation(new, cache.lengths, self._keys)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, impl: str) -> Tensor:
        """Writes k, v (B, H_kv, N, D) behind each row's length; q (B, H, N, D) over what it then sees -> like q."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        for buffer, fresh in ((keys, k), (values, v)):
            buffer.transpose(1, 2)[self._places] = fresh.transpose(1, 2).to(buffer.dtype)
        part = slice(0, self._keys)
        return transfusion_attention(q.to(keys.dtype), keys[:, :, part], values[:, :, part], self.mask, impl=impl)


class Pair:
    """Two windows as one batch, the first's rows before the second's: every layer runs once on all rows, and attention
    runs on each part over its own, and no longer, cache."""

    def __init__(self, first: Window, second: Window) -> None:
        self.first, self.second, self.new = first, second, first.new
        self.positions = torch.cat([first.positions, second.positions])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, impl: str) -> Tensor:
        """As `Window.attend`, the batch of both."""
        split = len(self.first.positions)
        upper = self.first.attend(layer, q[:split], k[:split], v[:split], impl)
        return torch.cat([upper, self.second.attend(layer, q[split:], k[split:], v[split:], impl)])
