"""A machine that executes PTX for sm_90 on a CPU: the very instructions that Triton ships to a GPU.

    with Device(seed) as device: kernel[grid](*tensors_of_the_cpu)

assembly.py     text -> blocks of statements
writer.py       blocks -> Python functions, by instructions.py; arithmetic.py and matrices.py say what they compute
memory.py       global memory ends where tensors end; shared memory begins as NaN
asynchronous.py copies and products in flight happen late, early or in between; mbarriers
program.py      warps run in random order
driver.py       the machine in the place of Triton's CUDA driver
"""

from ptx_machine.driver import Device
from ptx_machine.memory import Fault

__all__ = ["Device", "Fault"]
