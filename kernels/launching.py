"""`launch(kernel, programs, *arguments, **constants)`: a Triton kernel's launch, looked up instead of bound again.

At each launch Triton's JIT binds names, works out what every argument is specialised on and formats the options into a
key. Here the key is the arguments themselves: integers by value, tensors by dtype and alignment. That is finer than the
JIT's own key, so what it compiled once for a key is right for every launch with that key.
"""

from typing import Any

import torch
from torch import Tensor
from triton import knobs

from transfusion.kernels.registry import TRITON_INTERPRET

# For each key of a kernel: what was compiled, and the constants in the kernel's order. The kernel is kept alive for its
# id.
_KNOWN: dict[int, tuple[Any, dict[Any, tuple[Any, tuple[Any, ...]]]]] = {}
_LIMIT = 4096  # keys kept for a kernel, so that lengths that never repeat do not fill the memory
# For AMD the JIT also looks at how large tensors are; an interpreted kernel is not compiled.
_DIRECT = not TRITON_INTERPRET and torch.version.hip is None


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """`kernel[(programs,)](*arguments, **constants)` on the device of its first argument.

    Args:
        kernel: a `triton.jit` or `gluon.jit` function whose constexprs come last.
        arguments: tensors, their descriptors, numbers and None, as many as come before the constexprs.
        constants: the constexprs by name, and launch options; their order is part of the key.
    """
    first = arguments[0] if isinstance(arguments[0], Tensor) else arguments[0].base
    with torch.cuda.device_of(first):
        if not _DIRECT or kernel.pre_run_hooks:
            kernel[(programs,)](*arguments, **constants)
            return
        _, known = _KNOWN.setdefault(id(kernel), (kernel, {}))
        key = (
            *[each if type(each) is int or each is None else _kind(each) for each in arguments],
            *constants.values(),
            first.device,
            knobs.runtime.debug,
            knobs.compilation.instrumentation_mode,
            getattr(knobs.runtime, "add_stages_inspection_hook", None),  # from Triton 3.7 on
        )
        found = known.get(key)
        if found is not None:
            compiled, rest = found
            compiled[(programs, 1, 1)](*arguments, *rest)
            return
        compiled = kernel[(programs,)](*arguments, **constants)
        if compiled is None:  # one of Triton's hooks kept it from compiling
            return
        if len(known) >= _LIMIT:
            known.clear()
        known[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])


def _kind(argument: Any) -> Any:
    """What a kernel is specialised on: dtype and alignment of a tensor, shape and element type of a descriptor (its
    layout is fixed by its place in the kernel), of a float only that it is one."""
    if type(argument) is float:
        return float
    if isinstance(argument, Tensor):
        return argument.dtype, not argument.data_ptr() & 15
    return argument.base.dtype, *argument.block_shape
