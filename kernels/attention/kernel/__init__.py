"""Flash attention over an interval mask in Triton: the launchers, as `op.py` calls them."""

from transfusion.kernels.attention.kernel.gradients import backward
from transfusion.kernels.attention.kernel.online_softmax import forward

__all__ = ["backward", "forward"]
