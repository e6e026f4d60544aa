"""What is read from a listing of machine code; tests/ptx/test_sass.py reads real ones."""

import pytest

from transfusion.kernels.sass import count_spills, hazards, inner_loops, instructions

SASS = """
        /*0000*/                   STL [R1+0x8], R22 ;                     /* 0x0000081601007387 */
                                                                           /* 0x0003e80000100800 */
        /*0010*/                   LDL R16, [R1+0x4] ;                     /* the loop over heads: 0010 .. 0060 */
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR32], R88 ;
        /*0030*/              @!P1 BRA 0x20 ;                              /* a loop over tiles */
        /*0040*/                   LDL.LU R3, [R1] ;                       /* another */
        /*0050*/               @P2 BRA.U UP0, `(.L_x_1) ;
        /*0058*/               @P0 BRA P3, 0x0040 ;
        /*0060*/                   BRA 0x10 ;
        /*0070*/                   BRA 0x90 ;                              /* forward */
        /*0080*/                   STL.64 [R1], R4 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0 ;
"""


def test_innermost_loops_are_found() -> None:
    loops = inner_loops(instructions(SASS))
    assert [len(loop) for loop in loops] == [2, 3]
    assert loops[0][0].opcode.startswith("HGMMA") and loops[1][0].opcode == "LDL.LU"


def test_spills_are_counted_in_innermost_loops() -> None:
    def spills(sass: str) -> int:
        return count_spills(inner_loops(instructions(sass)))

    assert spills(SASS) == 1
    assert spills(SASS.replace("HGMMA", "STL [R1+0x40], R7 ; /*0028*/ HGMMA")) == 2
    assert spills(SASS.replace("LDL.LU", "LDS")) == 0


def listing(*lines: str) -> str:
    """Each line at the next multiple of 16."""
    return "\n".join(f"        /*{16 * number:04x}*/   {line} ;   /* 0x0 */" for number, line in enumerate(lines))


# scores in R24..R55 of an operand in memory; then R88.. += what R64..R67 and R68..R71 hold
SCORES = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0"
FIRST = "HGMMA.64x64x16.F32.BF16 R88, R64, gdesc[UR4], R88"
SECOND = "HGMMA.64x64x16.F32.BF16 R88, R68, gdesc[UR8], R88, gsb0"
WAIT, WAIT_BUT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"


@pytest.mark.parametrize(
    "lines",
    [
        ("MOV R64, R2", FIRST, SECOND, WAIT, "MOV R64, R2", "FADD R2, R88, R89"),
        (FIRST, SECOND, "MOV R72, R64", "STS [R64], R65", WAIT),  # what is read may be read
        (SCORES, FIRST, SECOND, WAIT_BUT_ONE, "FADD R2, R24, R55", WAIT, "FADD R2, R88, R119"),
        (SCORES, "BAR.SYNC R0", "ISETP.GE.AND P0, PT, R2, R3, PT", "@P0 BRA 0x10", WAIT, "MOV R24, RZ"),
        (FIRST, SECOND, WAIT, "@P0 BRA 0x0", "EXIT", "MOV R64, R2"),
        (FIRST, SECOND, "EXIT", "MOV R88, R64"),  # of another path
    ],
)
def test_what_waits_is_right(lines: tuple[str, ...]) -> None:
    assert hazards(instructions(listing(*lines))) == []


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ((FIRST, SECOND, "MOV R64, R2", WAIT), "0x20 MOV R64, R2: writes what 0x0 reads"),
        ((FIRST, "LDS.128 R60, [R2]", "LDS.128 R68, [R2]", SECOND, "LDS.128 R68, [R2]"), "0x40 LDS.128 R68, [R2]: "),
        ((FIRST, SECOND, "LDSM.16.M88.4 R62, [R2]", WAIT), "0x20 LDSM.16.M88.4 R62, [R2]: writes what 0x0 reads"),
        ((FIRST, SECOND, "CS2R R66, SRZ", WAIT), "0x20 CS2R R66, SRZ: writes what 0x0 reads"),
        ((FIRST, SECOND, "SHFL.BFLY PT, R71, R2, 0x1, 0x1f", WAIT), "0x20 SHFL.BFLY PT, R71, R2, 0x1, 0x1f: writes"),
        ((SCORES, "FMNMX R2, R24, R25, !PT", WAIT), "0x10 FMNMX R2, R24, R25, !PT: touches what 0x0 writes"),
        ((SCORES, "@P1 MOV R55, RZ", WAIT), "0x10 @P1 MOV R55, RZ: touches what 0x0 writes"),
        ((SCORES, "STS [R2], R40", WAIT), "0x10 STS [R2], R40: touches what 0x0 writes"),
        ((SCORES, FIRST, SECOND, WAIT_BUT_ONE, "MOV R2, R88"), "0x40 MOV R2, R88: touches what 0x10 writes"),
        ((FIRST, "MOV R64, R2", SECOND, WAIT), "0x10 MOV R64, R2: writes what 0x0 reads"),  # of no group yet
        (("MOV R64, R2", FIRST, SECOND, "@P0 BRA 0x0", WAIT), "0x0 MOV R64, R2: writes what 0x10 reads"),
        ((FIRST, SECOND, "BRA 0x40", "EXIT", "MOV R88, RZ", WAIT), "0x40 MOV R88, RZ: touches what 0x0 writes"),
        (("USETMAXREG.DEALLOC.CTAPOOL 0x18", "IADD3 R24, R2, R3, RZ"), "0x10 IADD3 R24, R2, R3, RZ: a thread has 24 "),
    ],
)
def test_what_is_in_the_way_of_a_product_is_found(lines: tuple[str, ...], found: str) -> None:
    first, *_ = hazards(instructions(listing(*lines)))
    assert first.startswith(found)


def test_a_product_of_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="is a product of a kind that is not known here"):
        hazards(instructions(listing("HGMMA.64x64x32.F16.E4M3 R24, R2, gdesc[UR4], R24, gsb0", "MOV R2, R3")))
