"""The library on the machine: a CPU tensor passes for one of a GPU wherever a kernel is chosen and launched."""

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from ptx_machine import Device

from transfusion.kernels import launching, tuning
from transfusion.kernels.mask_tiles import kernel as mask_tiles_kernel
from transfusion.kernels.testing import poison_empty

TABLES = {90: "sm_90", 80: "default"}
# Modules that look up what launches: a module's attribute of the same name may be a function.
attention_op = importlib.import_module("transfusion.kernels.attention.op")
mask_tiles_op = importlib.import_module("transfusion.kernels.mask_tiles.op")
contract = importlib.import_module("transfusion.kernels.image_contract")


@contextmanager
def playing(capability: int, seed: int, together: bool = True, processors: int = 132) -> Iterator[Device]:
    """impl="triton" runs on the machine, by the launch table of the GPU that is played; what kernels leave is NaN."""
    with ExitStack() as patches:

        def change(owner: object, name: str, value: object) -> None:
            patches.enter_context(patch.object(owner, name, value))

        change(tuning, "table_name", lambda device: TABLES[capability])
        change(tuning, "processors", lambda device: processors)
        change(mask_tiles_op, "_module", lambda intervals: mask_tiles_kernel)
        change(attention_op, "triton_reasons", lambda **call: [])
        change(contract, "triton_reasons", lambda **call: [])
        change(launching, "_KNOWN", {})  # of this GPU: the device of a tensor says "cpu" of each that is played
        poison_empty(change)
        yield patches.enter_context(Device(seed, capability, together))
