"""Compile every Triton kernel for every architecture, without a GPU, and record what the compiler says it needs.

Writes benchmarks/results/triton_resources.csv: registers, spills and shared memory of each kernel. What is compiled is
what the launchers launch: they are called with small tensors, for a driver that knows its target and nothing else.

    python scripts/triton_resources.py [table.csv]
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and os.environ.pop("TRITON_INTERPRET", "0") == "1":
    print("TRITON_INTERPRET is ignored: interpreted kernels cannot be compiled", file=sys.stderr)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TABLE = ROOT / "benchmarks" / "results" / "triton_resources.csv"

from vgpo_kernels import PolicyLossOptions, ShapingConfig, VGPOConfig  # noqa: E402
from vgpo_kernels.config import CHOICES  # noqa: E402
from vgpo_kernels.ops import registry  # noqa: E402
from vgpo_kernels.triton_kernels import attention_mass, linear_divergence, linear_logprob  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
FEATURES = 3584


class Resources(NamedTuple):
    """What one kernel takes on one architecture."""

    triton: str
    architecture: str
    kernel: str
    variant: str  # which call it was compiled for
    warps: int
    registers: int  # of a thread
    shared_bytes: int
    stack_bytes: int
    spills: int  # loads and stores of local memory on NVIDIA, vector registers in memory on AMD


class Launch(NamedTuple):
    """A kernel as a launcher asked for it: everything that its machine code depends on."""

    variant: str
    kernel: Any
    key: Any
    source: ASTSource
    options: dict[str, Any]


class Driver:
    """What Triton asks of a GPU's driver before it launches."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # Triton keeps compiled kernels by device, and each target needs its own.
        return str(self.target)

    def get_current_stream(self, device: object) -> int:
        return 0


@contextmanager
def recording(target: GPUTarget, variant: str = "") -> Iterator[list[Launch]]:
    """Record the launches inside the ``with`` block; nothing is compiled or run."""
    launches: list[Launch] = []

    def record(*, key: Any, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        source = ASTSource(
            fn=fn.jit_function,
            signature=compile["signature"],
            constexprs=compile["constants"],
            attrs=compile["configs"][0],
        )
        options = {name: compile[name] for name in ("num_warps", "num_stages")}
        launches.append(Launch(variant, fn.jit_function, key, source, options))
        return True  # which tells Triton to leave it at that

    runtime = triton.runtime.driver
    # Asked for its driver, Triton would look for a GPU, and where it keeps the answer depends on its release.
    previous_state, previous_hook = dict(vars(runtime)), triton.knobs.runtime.jit_cache_hook
    runtime.set_active(Driver(target))
    triton.knobs.runtime.jit_cache_hook = record
    try:
        yield launches
    finally:
        triton.knobs.runtime.jit_cache_hook = previous_hook
        vars(runtime).update(previous_state)


def call_of(operator: str, **given: Any) -> Callable[[], Any]:
    """Return a call of an operator with arguments by name, ``None`` for those of its schema that are not given."""
    arguments = dict.fromkeys(registry.OPERATORS[operator].arguments) | given
    return lambda: registry.implementation(operator, "triton")(**arguments)


def calls(loss_types: Iterable[str]) -> dict[str, Callable[[], Any]]:
    """Return calls that between them launch every kernel, in the variants that take the most registers."""
    batch, rows, tokens = 2, 64, 32
    hidden = torch.zeros(batch, rows, FEATURES, dtype=torch.bfloat16)
    visual = torch.zeros(batch, rows, dtype=torch.bool)
    mask = torch.zeros(batch, tokens, dtype=torch.bool)
    values, per_response = torch.zeros(batch, tokens), torch.zeros(batch)
    groups = torch.zeros(batch, dtype=torch.int64)
    boundaries = torch.tensor([0, rows, 2 * rows])
    flat_hidden, flat_visual = hidden.view(-1, FEATURES), visual.view(-1)
    flat_values = torch.zeros(batch * rows)
    paper, released = VGPOConfig.paper().as_floats(), VGPOConfig.released().as_floats()

    def options(**changes: Any) -> list[float]:
        everything = {"kl_coef": 0.1, "entropy_coef": 0.1, "kl_bias_correction": True, "importance_cap": 2.0}
        return PolicyLossOptions(**everything, **changes).as_floats()

    terms = ("logp", "old_logp", "ref_logp", "entropy", "importance_weights")

    def policy(loss_type: str) -> Callable[[], Any]:
        return call_of(
            "policy_loss",
            **dict.fromkeys((*terms, "factors"), values),
            advantages=per_response,
            response_mask=mask,
            options=options(loss_type=loss_type, aggregation="token-mean"),
        )

    image = {"hidden": flat_hidden, "visual_mask": flat_visual, "response_mask": flat_visual, "cu_seqlens": boundaries}
    return {
        "vgpo_loss, packed, bfloat16": call_of(
            "vgpo_loss",
            **dict.fromkeys((*terms, "advantages"), flat_values),
            **image,
            group_ids=groups,
            config=paper,
            options=options(loss_type="dapo"),
        ),
        "visual_focus, given prototypes, float32": call_of(
            "visual_focus",
            hidden=hidden.float(),
            response_mask=mask,
            prototype=torch.zeros(batch, FEATURES),
            prototype_index=groups,
        ),
        "visual_focus, a prototype per token, bfloat16": call_of(
            "visual_focus",
            hidden=hidden,
            response_mask=mask,
            prototype=torch.zeros(batch, FEATURES),
            prototype_index=torch.zeros(batch, tokens, dtype=torch.int64),
        ),
        "visual_focus, causal, packed, bfloat16": call_of("visual_focus", **image, causal=True),
        "visual_focus, unit, causal, packed, bfloat16": call_of("visual_focus", **image, causal=True, unit=True),
        "visual_prototype, causal, bfloat16": call_of(
            "visual_prototype", hidden=hidden, visual_mask=visual, causal=True
        ),
        "visual_prototype, unit, causal, bfloat16": call_of(
            "visual_prototype", hidden=hidden, visual_mask=visual, causal=True, unit=True
        ),
        "visual_weights, released": call_of(
            "visual_weights", cos=values, response_mask=mask, group_ids=groups, config=released
        ),
        "group_weights": call_of("group_weights", score=per_response, group_ids=groups, config=paper),
        **shaping_calls(),
        **{f"policy_loss, {name}": policy(name) for name in loss_types},
        **attention_calls(),
        **head_calls(),
        **pair_calls(),
    }


def shaping_calls() -> dict[str, Callable[[], Any]]:
    """Return calls of token_shaping with the settings that take the most registers, and of its second phase."""
    batch, tokens = 2, 32
    signal = torch.zeros(batch, tokens)
    given = {"group_ids": torch.zeros(batch, dtype=torch.int64), "progress": 0.5}
    tokens_given = given | {"response_mask": torch.zeros(batch, tokens, dtype=torch.bool)}
    signals = dict.fromkeys(("visual", "entropy", "gap"), signal)
    top = ShapingConfig(top_visual=0.3, top_entropy=0.3, fusion="soft_or", times_entropy=True)
    variants = {
        "softmax, min_max": replace(top, weight="softmax", entropy_gate=0.1, response="min_max", schedule="linear"),
        "gate, softmax": replace(top, weight="gate", log1p=True, response="softmax", response_scope="group"),
        "cgpo": ShapingConfig.cgpo(),
    }
    return {
        **{
            f"token_shaping, {name}": call_of("token_shaping", **signals, **tokens_given, config=config.as_floats())
            for name, config in variants.items()
        },
        "response_factors, cgpo": call_of(
            "response_factors", **given, score=torch.zeros(batch), config=ShapingConfig.cgpo().as_floats()
        ),
    }


def attention_calls() -> dict[str, Callable[[], Any]]:
    """Return calls of the attention operators, in the layout and element type that models use."""
    batch, heads, key_heads, queries, keys, size, segments = 2, 28, 4, 16, 64, 128, 3
    q = torch.zeros(batch, heads, queries, size, dtype=torch.bfloat16)
    k = torch.zeros(batch, key_heads, keys, size, dtype=torch.bfloat16)
    labels = torch.zeros(batch, keys, dtype=torch.int32)
    weights = torch.zeros(batch, queries)
    lse = torch.zeros(batch, heads, queries)
    mass, heat = torch.zeros(batch, heads, queries, segments), torch.zeros(batch, heads, keys)
    image, layout, scale, window = (q, k, labels, None), (None, None), 1.0, 0
    module = attention_mass
    return {
        "attention_mass, bfloat16": lambda: module.attention_mass(*image, *layout, segments, scale, window, False),
        "attention_mass_backward, bfloat16": lambda: module.attention_mass_backward(
            mass, *image, *layout, mass, lse, scale, window
        ),
        "attention_heatmap, bfloat16": lambda: module.attention_heatmap(
            *image, weights, lse, *layout, scale, window, False
        ),
        "attention_heatmap_backward, bfloat16": lambda: module.attention_heatmap_backward(
            heat, *image, weights, lse, *layout, scale, window
        ),
    }


def head_calls() -> dict[str, Callable[[], Any]]:
    """Return calls of the LM head's two epilogues, on the logits of a chunk."""
    rows, columns = 4, 64
    hidden, weight = torch.zeros(rows, 16, dtype=torch.bfloat16), torch.zeros(columns, 16, dtype=torch.bfloat16)
    targets, logits = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, columns)
    chunk = (hidden, weight, torch.zeros(columns), targets, 0, 1.0, None, 1.0, 0.0)
    return {
        "head_statistics": lambda: linear_logprob.head_statistics(*chunk, torch.zeros(4, rows), logits, True),
        "head_gradient, bfloat16": lambda: linear_logprob.head_gradient(*chunk, torch.zeros(5, rows), logits, False),
    }


def pair_calls() -> dict[str, Callable[[], Any]]:
    """Return calls of the epilogues of an LM head before two views, on the logits of a chunk."""
    pairs, columns = 4, 64
    rows, weight = torch.zeros(2 * pairs, 16, dtype=torch.bfloat16), torch.zeros(columns, 16, dtype=torch.bfloat16)
    targets, logits, bias = torch.zeros(pairs, dtype=torch.int64), torch.zeros(2 * pairs, columns), torch.zeros(columns)
    head, logit_map = (rows, weight, bias, bias), (1.0, None, 1.0, 0.0)
    coefficients, totals = torch.zeros(20, pairs), torch.zeros(4, pairs)
    module = linear_divergence
    return {
        "pair_statistics": lambda: module.pair_statistics(
            *head, targets, 0, *logit_map, torch.zeros(11, pairs), logits, False
        ),
        "pair_shares": lambda: module.pair_shares(*head, *logit_map, totals, 0.5, torch.zeros(4, pairs), logits, False),
        "pair_gradient, bfloat16": lambda: module.pair_gradient(
            *head, targets, 0, *logit_map, coefficients, 0.5, logits, False
        ),
    }


def record_all(architecture: str) -> list[Launch]:
    """Return every distinct kernel that :func:`calls` launch on an architecture; on one of them for every loss."""
    found: dict[Any, Launch] = {}
    for variant, call in calls(CHOICES["loss_type"] if architecture == "sm_90" else ["gspo"]).items():
        with recording(TARGETS[architecture], variant) as launches:
            call()
        for launch in launches:
            found.setdefault((launch.kernel.__name__, launch.key), launch)
    return list(found.values())


def measure(launch: Launch, architecture: str) -> Resources:
    """Compile a kernel, and read what it needs out of the machine code."""
    compiled = triton.compile(launch.source, target=TARGETS[architecture], options=launch.options)
    read = read_cubin if "cubin" in compiled.asm else read_amdgcn
    registers, stack, spills = read(compiled.asm)
    return Resources(
        triton.__version__,
        architecture,
        launch.kernel.__name__.removesuffix("_kernel"),
        launch.variant,
        compiled.metadata.num_warps,
        registers,
        compiled.metadata.shared,
        stack,
        spills,
    )


def read_cubin(asm: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return registers of a thread, bytes of its stack, and instructions that spill."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"\b(REG|STACK):(\d+)", said))
    return int(numbers["REG"]), int(numbers["STACK"]), len(re.findall(r"\b(?:STL|LDL)\b", said))


def read_amdgcn(asm: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return vector registers of a thread, bytes of its stack, and registers that spill to it."""
    found = re.findall(r"^\s*\.(\w+):\s+(\d+)$", asm["amdgcn"], re.MULTILINE)
    numbers = {name: int(value) for name, value in found}
    # Scalar registers spill too, but into lanes of vector registers, which are counted as such.
    return numbers["vgpr_count"], numbers["private_segment_fixed_size"], numbers["vgpr_spill_count"]


def compile_all() -> list[Resources]:
    """Compile every kernel for every architecture."""
    return [measure(launch, name) for name in TARGETS for launch in record_all(name)]


def read_table(path: Path = TABLE) -> list[Resources]:
    """Return a recorded table."""
    with path.open(newline="") as file:
        return [Resources(*row[:4], *map(int, row[4:])) for row in list(csv.reader(file))[1:]]


def write_table(rows: list[Resources], path: Path = TABLE) -> None:
    """Record a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Resources._fields)
        writer.writerows(rows)


def main() -> None:
    """Compile, record and print the table."""
    rows = compile_all()
    write_table(rows, Path(sys.argv[1]) if len(sys.argv) > 1 else TABLE)
    for row in rows:
        print(*row, sep="\t")


if __name__ == "__main__":
    main()
