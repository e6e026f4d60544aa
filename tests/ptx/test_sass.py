"""Machine code that ptxas makes of attention on Hopper: nothing is in the way of its products, and a wait that is
taken out is missed."""

import pytest

from transfusion.kernels.ahead_of_time import all_cases, assembled, dumped
from transfusion.kernels.sass import Instruction, hazards, instructions

KERNELS = ("forward", "backward_query", "backward_key", "specialised_forward", "specialised_key", "specialised_query")


@pytest.mark.parametrize("function", KERNELS)
def test_every_wait_is_needed(function: str) -> None:
    case = next(
        case
        for case in all_cases("sm_90")
        if case.function == function and case.dtype == "bf16" and case.constants["HEAD_DIM"] == 64
    )
    code = instructions(dumped(assembled(case, "sm_90").asm["cubin"], "sass"))
    waits = [each for each in code if each.opcode.startswith("WARPGROUP.DEPBAR")]
    assert len(waits) >= 4 and hazards(code) == []
    for wait in waits:
        assert hazards([each for each in code if each is not wait]), f"without {wait}"
    grants = [each for each in code if each.opcode.startswith("USETMAXREG") and each.operands[-1] == "0xf0"]
    assert bool(grants) == function.startswith("specialised")
    for each in grants:  # to both groups that multiply
        fewer = Instruction(each.at, each.predicate, each.opcode, (*each.operands[:-1], "0xa8"))
        assert "a thread has 168 registers" in hazards([fewer if one is each else one for one in code])[0]
