"""`launch(kernel, programs, *arguments, **constants)`: a Triton kernel's launch, looked up instead of bound again.

At each launch Triton's JIT binds names, asks of every argument what it would specialise on and prints the options into
a key. Here a launch is known by its arguments as they are, whole numbers by their values and tensors by dtype and
alignment, which is finer than what the JIT tells apart: what it compiled for a key once is right for all its launches.
"""

from typing import Any

import torch
from torch import Tensor
from triton import knobs

from transfusion.kernels.registry import TRITON_INTERPRET

# What was compiled for a key of a kernel, and the constants in the kernel's order. The kernel is kept for its id.
_KNOWN: dict[int, tuple[Any, dict[Any, tuple[Any, tuple[Any, ...]]]]] = {}
_LIMIT = 4096  # keys of a kernel: lengths that never repeat do not fill the memory
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
        if compiled is None:  # a hook of Triton's had it not compiled
            return
        if len(known) >= _LIMIT:
            known.clear()
        known[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])


def _kind(argument: Any) -> Any:
    """What a kernel is specialised on of a tensor, or of a descriptor, whose layout is that of its place in the kernel;
    of a float only that it is one."""
    if type(argument) is float:
        return float
    if isinstance(argument, Tensor):
        return argument.dtype, not argument.data_ptr() & 15
    return argument.base.dtype, *argument.block_shape
