"""What the compiler makes of the main loops for sm_90a: loads in batches, few instructions a tile, nothing in between.

Each limit is what nvcc 13.0 reaches. One that is exceeded says that a change has lost something which once made a
kernel faster; docs/adding-an-op.md says how to read a failure.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
from compiled import cuda_resources, machine_code, require_nvcc, skip
from machine_code import COMPARES, Instruction, Kernel, Loop, Path, texts

pytestmark = pytest.mark.slow  # the kernels are compiled first

RELEASE = "13.0"  # whose code the limits are taken from
SLACK = 1.05  # instructions of a tile may be so many times as recorded

ELEMENTS = {"float32": "f", "float16": "6__half", "bfloat16": "13__nv_bfloat16"}
HALVES = ("float16", "bfloat16")
# Attention has kernels for single sizes of heads, and one for the rest, which is not looked at.
TESTED = (
    "(visual_(focus|prototype)|head_(statistics|gradient)|pair_(statistics|shares|gradient)|policy_loss)_kernelI"
    "|vgpo_loss_kernelI13|attention_.*Li(64|128)E|head_tiles"
)


@functools.cache
def every_text() -> dict[str, str]:
    nvcc = require_nvcc()
    if cuda_resources.release(nvcc) != RELEASE:
        skip(f"limits are those of nvcc {RELEASE}, and this is {cuda_resources.release(nvcc)}")
    return texts(machine_code(nvcc, TESTED))


@functools.cache
def kernel(name: str, *parameters: str) -> Kernel:
    """Return the instance of a kernel with the given template parameters, the first of them mangled."""
    start = f"{len(name) + len('_kernel')}{name}_kernelI{''.join(parameters)}"
    (text,) = (text for mangled, text in every_text().items() if start in mangled)
    return Kernel(text)


GUARDED = "an exponential guards itself against subnormal numbers"


def check_no_local_memory(code: Kernel) -> None:
    assert code.instructions.number("LDL", "STL") == 0, "values of a thread go through memory"


# ---- rows of hidden states and logits --------------------------------------------------------------------------


class Streams(NamedTuple):
    """What a kernel that reads rows does on sm_90a."""

    batches: dict[str, tuple[int, ...]]  # 16-byte loads of a round of its loops, by element
    prefetches: int  # bulk prefetches in the code


SUM, SCORE = 8, {"float32": 9, "float16": 10, "bfloat16": 10}  # eight rows, and with them their prototype
STREAMS = {
    "visual_prototype": Streams(dict.fromkeys(ELEMENTS, (SUM,)), 1),
    "visual_focus": Streams({element: (SCORE[element], SUM) for element in ELEMENTS}, 2),
    "vgpo_loss": Streams({"bfloat16": (SCORE["bfloat16"], SUM)}, 8),
}


def check_batch(loop: Loop, expected: int) -> Path:
    """All global loads of a round are 16 bytes wide, and go out before the first one's result is used."""
    path = loop.path("LDG.128", "MUFU.EX2")
    assert path.number("LDG.128") == expected, "not the number of 16-byte loads that was there"
    assert path.number("LDG") == expected, "a narrow load stands beside those of 16 bytes"
    assert path.batch("LDG.128") == expected, "a result is waited for before the last load has gone out"
    assert path.between("LDG.128").branches == 0, "a branch stands between the loads"
    return path


@pytest.mark.parametrize(("name", "element"), [(name, one) for name in STREAMS for one in STREAMS[name].batches])
def test_rows_are_read_in_batches(name: str, element: str) -> None:
    code, expected = kernel(name, ELEMENTS[element]), STREAMS[name]
    check_no_local_memory(code)
    batches = expected.batches[element]
    # Rows that are not aligned, or single, have loops of their own.
    wide = sorted(code.innermost, key=lambda loop: loop.path("LDG.128").number("LDG.128"), reverse=True)
    for loop, batch in zip(wide, batches, strict=False):
        path = check_batch(loop, batch)
        assert path.number("LDG.EF") == 8, "rows that are read once should leave the cache first"
        assert path.branches == 1, "but for the loop's end there should be no branch"
        assert path.number(*COMPARES) <= 2
    assert code.instructions.number("UBLKPF") >= expected.prefetches, "rows are not asked for ahead"


@pytest.mark.parametrize(
    ("name", "element"), [("head_statistics", "Li256E"), *(("head_gradient", element) for element in ELEMENTS)]
)
def test_logits_are_read_in_batches(name: str, element: str) -> None:
    plain = ("Lb0E",) * (2 if name == "head_statistics" else 1)  # neither capped nor with squares
    code = kernel(name, ELEMENTS.get(element, element), *plain)  # of statistics: threads
    check_no_local_memory(code)
    (loop,) = code.loops
    path = check_batch(loop, 4)
    exponentials = path.number("MUFU.EX2")
    assert exponentials == (17 if name == "head_statistics" else 16)  # one to merge the statistics of two passes
    # Bounds of the pass, and in the gradient the target, which is looked for at each logit.
    compares = {"head_statistics": 10, "head_gradient": 25}[name]
    assert path.number(*COMPARES) <= compares + 2
    assert path.guarded_products == 0, GUARDED
    assert path.branches <= {"head_statistics": 3, "head_gradient": 4}[name]
    if name == "head_gradient":
        width = "128" if element == "float32" else "64"
        assert path.number(f"STG.{width}") == path.number("STG") == 4, "gradients should leave in whole vectors"
    assert len(path) <= {"Li256E": 281, "float32": 350}.get(element, 333) * SLACK


class Pairs(NamedTuple):
    """A pass over both views' rows: 16 entries of the vocabulary a thread."""

    exponentials: int
    compares: int
    branches: int
    instructions: int


PAIRS = {
    # Half the distance of both views, and five to move sums to larger logits.
    "pair_statistics": Pairs(37, 60, 12, 868),
    # Two and the mixture's, whose logarithm looks for subnormal numbers.
    "pair_shares": Pairs(48, 102, 4, 1240),
    "pair_gradient": Pairs(32, 43, 7, 874),
}


@pytest.mark.parametrize(
    ("name", "element"),
    [("pair_statistics", "Li128E"), ("pair_shares", "Li128E"), *(("pair_gradient", element) for element in ELEMENTS)],
)
def test_pairs_of_logits_are_read_in_batches(name: str, element: str) -> None:
    code, expected = kernel(name, ELEMENTS.get(element, element), "Lb0E"), PAIRS[name]
    check_no_local_memory(code)
    (loop,) = code.loops
    check_batch(loop, 8)  # four of each view
    # Of a gradient the way without shares, where nothing else is computed.
    path = loop.path("LDG.128") if name == "pair_gradient" else loop.path("LDG.128", "MUFU.EX2")
    assert path.number("MUFU.EX2") == expected.exponentials
    assert path.number(*COMPARES) <= expected.compares + 2
    assert name == "pair_shares" or path.guarded_products == 0, GUARDED
    assert path.branches <= expected.branches
    if name == "pair_gradient":
        width = "128" if element == "float32" else "64"
        assert path.number(f"STG.{width}") == path.number("STG") == 8, "gradients should leave in whole vectors"
    assert len(path) <= expected.instructions * SLACK


@pytest.mark.parametrize(
    ("name", "parameter", "prefetches"), [("policy_loss", "Li512E", 7), ("vgpo_loss", ELEMENTS["bfloat16"], 8)]
)
def test_inputs_of_tokens_are_read_in_a_batch(name: str, parameter: str, prefetches: int) -> None:
    code = kernel(name, parameter)
    check_no_local_memory(code)
    # The loop that computes losses: it has exponentials and stores gradients.
    loop = next(one for one in code.loops if one.instructions.number("MUFU.EX2") and one.instructions.number("STG"))
    assert loop.path("LDG").batch("LDG") >= 8
    assert loop.path("LDG").between("LDG").branches == 0, "a branch stands between the loads"
    assert code.instructions.number("UBLKPF") >= prefetches, "arrays are not asked for ahead"


# ---- tiles of attention ----------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """What a warp does for a streamed tile, of which each of its rows sees everything; by size of head."""

    products: dict[int, int]  # of matrices, by tensor cores
    exponentials: int
    instructions: dict[int, int]
    partly_seen: dict[int, int]  # instructions where not everything is seen
    branches: int  # of the code between the first product and the last one or exponential
    loads: int = 0  # from global memory there


TILES = {
    ("attention_mass", ""): Tile({64: 64, 128: 128}, 68, {64: 543, 128: 635}, {64: 1254, 128: 1346}, 3),
    ("attention_heatmap", ""): Tile({64: 64, 128: 128}, 64, {64: 417, 128: 510}, {64: 826, 128: 919}, 2),
    # Of masses, and of a heat map.
    ("attention_query_gradient", "Lb0E"): Tile({64: 64, 128: 128}, 32, {64: 338, 128: 445}, {64: 900, 128: 1006}, 4),
    ("attention_query_gradient", "Lb1E"): Tile({64: 64, 128: 128}, 32, {64: 323, 128: 430}, {64: 1054, 128: 1158}, 3),
    ("attention_key_gradient", "Lb0E"): Tile({64: 64, 128: 128}, 32, {64: 366, 128: 500}, {64: 1322, 128: 1456}, 3),
    ("attention_key_gradient", "Lb1E"): Tile({64: 64, 128: 128}, 32, {64: 752, 128: 886}, {64: 984, 128: 1158}, 2, 32),
}
HALF = pytest.mark.parametrize("element", HALVES)
SIZE = pytest.mark.parametrize("size", [64, 128])


def tile_loop(code: Kernel, products: int) -> Loop:
    """Return the smallest loop with a tile's products."""
    return next(loop for loop in code.loops if loop.instructions.number("HMMA") >= products)


@pytest.mark.parametrize("name", TILES, ids="".join)
@SIZE
@HALF
def test_tiles_of_attention(name: tuple[str, str], size: int, element: str) -> None:
    expected = TILES[name]
    code = kernel(name[0], ELEMENTS[element], name[1], f"Li{size}E")
    check_no_local_memory(code)
    loop = tile_loop(code, expected.products[size])
    path = loop.path("HMMA", "MUFU.EX2", "LDGSTS")
    assert path.number("HMMA") == expected.products[size]
    assert path.number("MUFU.EX2") == expected.exponentials
    assert path.number("LDGSTS.128") == path.number("LDGSTS") == size // 16, "copies should be 16 bytes wide"
    # A gradient needs the streamed rows as the right operand of two products; own rows stay in registers.
    assert path.number("LDSM") <= (size // 2 if "gradient" in name[0] else size // 4), "own rows are loaded again"
    assert loop.instructions.guarded_products == 0, GUARDED
    assert loop.instructions.number("CALL") == 0

    scoring = path.between("HMMA", "MUFU.EX2")
    assert scoring.branches <= expected.branches, "a branch stands in the code of the scores"
    # Those of the tile as a whole are few; one a score would be many.
    assert scoring.number(*COMPARES) <= expected.exponentials // 4, "scores are compared with something"
    assert scoring.number("LDG") <= expected.loads, "scores wait for global memory"
    assert len(path) <= expected.instructions[size] * SLACK
    masked = loop.path("HMMA", "MUFU.EX2", "LDGSTS", "ISETP")
    assert len(masked) <= expected.partly_seen[size] * SLACK


@SIZE
@HALF
def test_means_of_a_heat_map(size: int, element: str) -> None:
    """The pass of the queries' gradient that adds up means, before the one of :data:`TILES`."""
    code = kernel("attention_query_gradient", ELEMENTS[element], "Lb1E", f"Li{size}E")
    (loop,) = (one for one in code.loops if one.instructions.number("HMMA") == size // 2)
    path = loop.path("HMMA", "MUFU.EX2", "LDGSTS")
    assert path.number("MUFU.EX2") == 32
    assert loop.instructions.guarded_products == 0, GUARDED
    assert len(path) <= {64: 794, 128: 894}[size] * SLACK


@SIZE
@HALF
def test_tiles_of_attention_by_warpgroups(size: int, element: str) -> None:
    """Two products for 64 rows each, which take turns with the exponentials of the other one."""
    code = kernel("attention_warpgroup", ELEMENTS[element], f"Li{size}E")
    check_no_local_memory(code)
    loop = next(loop for loop in code.loops if loop.instructions.number("HGMMA"))
    path = loop.path("HGMMA", "MUFU.EX2", "LDGSTS")
    assert path.number("HGMMA.64x64x16") == path.number("HGMMA") == size // 8
    assert path.number("WARPGROUP.DEPBAR") == 2, "products are waited for before the exponentials of the others"
    assert path.number("MUFU.EX2") == 68
    assert path.number("LDGSTS.128") == path.number("LDGSTS") == size // 16, "copies should be 16 bytes wide"
    assert path.number("LDSM") == 0, "own rows are loaded again"
    assert path.number("R2UR") == 0, "the compiler does not know that all lanes have the same tile"
    assert path.number("BAR") == path.number("MEMBAR") == path.number("FENCE") == 1
    assert loop.instructions.guarded_products == 0, GUARDED
    assert loop.instructions.number("CALL") == 0
    assert path.number("LDG") == 0, "scores wait for global memory"
    assert path.branches <= 12
    assert len(path) <= {64: 538, 128: 559}[size] * SLACK
    masked = loop.path("HGMMA", "MUFU.EX2", "LDGSTS", "ISETP")
    assert len(masked) <= {64: 1346, 128: 1367}[size] * SLACK


# ---- tiles of an LM head ---------------------------------------------------------------------------------------


class Epilogue(NamedTuple):
    """What becomes of a tile's 128 sums a thread."""

    exponentials: int
    instructions: int  # from the first exponential to the last, where the tile is whole
    branches: int  # there
    stores: int  # of 16 bytes
    step: int  # instructions of a step of the products before it


EPILOGUES = {
    "NS0_18Statistics": Epilogue(128, 857, 2, 2, 62),
    "NS0_16Gradient": Epilogue(130, 1703, 18, 16, 63),  # two more for the targets of a thread's rows
}
# Of a thread with everything in its block, or outside it: what waits for memory.
FENCES = ("MEMBAR", "ERRBAR", "CGAERRBAR", "FENCE", "CCTL")


@pytest.mark.parametrize("epilogue", EPILOGUES)
@HALF
def test_tiles_of_a_head(epilogue: str, element: str) -> None:
    expected, code = EPILOGUES[epilogue], kernel("head_tiles", ELEMENTS[element], epilogue)
    check_no_local_memory(code)
    loops = [loop for loop in code.loops if loop.instructions.number("HGMMA")]
    steps = loops[0].instructions  # several steps in a row
    number = steps.number("WARPGROUP.ARRIVE")
    assert steps.number("HGMMA.64x256x16") == steps.number("HGMMA") == 4 * number
    assert steps.number("WARPGROUP.DEPBAR") == number, "products are waited for more than once a step"
    assert steps.number("LDG", "STG", "LDS", "STS", "BAR") == 0, "a step does more than to multiply"
    assert len(loops[0].path("HGMMA")) <= number * expected.step * SLACK
    for loop in code.loops:  # of all warpgroups, that round the tiles too
        assert loop.instructions.number(*FENCES) == 0, "an arrival or a copy waits for memory"

    copies = code.instructions.number("UTMALDG.2D")
    assert code.instructions.number("UTMALDG.2D.MULTICAST") == copies // 2 > 0, (
        "half the boxes should go to both blocks"
    )
    registers = [one.operands for one in code.instructions if one.does("USETMAXREG")]
    assert sorted(registers) == ["0x28", "UP0, 0xe8"], "40 registers for who copies, 232 for who multiplies"

    tile = loops[-1].path("HGMMA", "MUFU.EX2", "STG.128")
    assert tile.number("MUFU.EX2") == expected.exponentials
    assert tile.guarded_products == 0, GUARDED
    assert tile.number("STG.128") == expected.stores
    exponentials = tile.between("MUFU.EX2")
    assert exponentials.branches <= expected.branches, "a branch stands between the exponentials"
    assert len(exponentials) <= expected.instructions * SLACK


# ---- the reader ------------------------------------------------------------------------------------------------

LISTING = """
        /*0000*/                   MOV R1, RZ ;
.L_x_0:
        /*0010*/                   LDG.E.EF.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.EF.128 R8, desc[UR4][R2.64+0x10] ;
        /*0030*/              @P1 BRA `(.L_x_1) ;
        /*0040*/                   FSETP.GEU.AND P0, PT, R7, -126, PT ;
        /*0050*/              @!P0 FMUL R7, R7, 0.5 ;
        /*0060*/                   MUFU.EX2 R7, R7 ;
        /*0070*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0080*/                   LDG.E.128 R12, desc[UR4][R2.64+0x20] ;
.L_x_2:
        /*0090*/                   FADD R9, R9, R1 ;
        /*00a0*/              @P2 BRA `(.L_x_0) ;
        /*00b0*/                   EXIT ;
"""


def test_a_loop_is_read() -> None:
    code = Kernel(LISTING)
    (loop,) = code.loops
    assert loop.blocks == {1, 2, 3, 4}
    exponential, load = loop.path("MUFU.EX2"), loop.path("LDG.128")
    assert [one.name for one in load if one.does("LDG")] == ["LDG.E.EF.128"] * 2 + ["LDG.E.128"]
    assert (exponential.batch("LDG.128"), load.batch("LDG.128")) == (2, 3)
    assert (exponential.guarded_products, load.guarded_products) == (1, 0)
    assert exponential.number(*COMPARES) == 1
    assert (exponential.branches, load.branches) == (2, 2)
    assert load.between("LDG.128").branches == 1
    assert len(exponential) == 9


def test_a_result_used_early_ends_a_batch() -> None:
    load = "LDG.E.128"
    early = Path([Instruction("", load, "R4, desc[UR4][R2.64]"), Instruction("", "FADD", "R7, R6, R1")])
    late = Path([*early, Instruction("", load, "R8, desc[UR4][R2.64]"), Instruction("", "FADD", "R7, R11, R1")])
    assert (early.batch("LDG.128"), late.batch("LDG.128")) == (1, 1)
