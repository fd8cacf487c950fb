"""What VGPO costs a training step, against TRL's own GRPOTrainer on the same model and rollouts.

    python benchmarks/bench_training_step.py [TABLE]      # shares from the rows of a table

A step is described in benchmarks/training_step.py: everything but generation. ``vgpo_kernels`` (``cuda`` on a GPU) is
VGPOTrainer with its signal read in the forward pass of the loss. Beside it stand TRL's GRPOTrainer, VGPOTrainer without
VGPO (whose LM head is ours, and loss TRL's), VGPO with the signal read in a forward pass of its own and with the
attention signal; and the first three where TRL computes old log-probabilities, a pass that VGPO then reads along. All
take turns, round by round, on every device. The share of VGPO is its time beyond TRL's, of TRL's, by medians; and the
same beyond VGPOTrainer without VGPO, so that neither head hides what the signal costs.

A GPU holds a few layers at 7B's widths. Times grow by the same amount a layer, for either trainer, so from rows at two
depths the command extrapolates both to the 28 layers of the model, on a straight line, and says so. The vision tower
then has 28 layers, not 32, which makes the share a little too large.

Prediction: with its signal read in the loss VGPO reads the last hidden states once more, which is 10^-4 of a step at
7B's widths, and waits for the device a few times. A pass of its own is a quarter of a step with gradient checkpointing;
old log-probabilities make that pass anyway. On a CPU, at a fourteenth of the width and a fourteenth of the layers, all
but the pass weighs far more.

Bytes: weights and gradients, read in two passes, written, and read and written by AdamW. Flops: products with weights,
forward and backward, without what checkpointing computes again; their ceiling on a CPU is a bare product.
"""

from __future__ import annotations

import csv
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.measure import RESULTS, Case, Ceiling, Op, Peer, installed  # noqa: E402
from vgpo_kernels import backend  # noqa: E402

TRL = "TRL's GRPOTrainer"
SAME_HEAD = "VGPOTrainer without VGPO"
OWN_PASS = "VGPO in a pass of its own"
ATTENTION = "VGPO by attention"
TRL_SCORES = "TRL's GRPOTrainer with old log-probs"
SAME_HEAD_SCORES = "VGPOTrainer without VGPO, with old log-probs"
VGPO_SCORES = "VGPO with old log-probs"
IN_THE_LOSS = ("vgpo_kernels", "cuda", "triton", "cpp")
LAYERS_OF_7B = 28
# A token at the edge of the gate may fall on either side: its share of a loss.
EDGE = 2e-3


class StepSize(NamedTuple):
    """Widths and depth of a Qwen2.5-VL, and the responses of one prompt."""

    batch: int
    image: int  # tokens, a square number
    response: int  # tokens of the longest response; the others are shorter
    layers: int  # of the decoder and of the vision tower
    features: int
    intermediate: int
    heads: int
    key_heads: int
    vocabulary: int
    vision_features: int
    vision_intermediate: int
    vision_heads: int

    def __str__(self) -> str:
        return (
            f"{self.batch} x ({self.image} image + {self.response} response), {self.layers} layers of "
            f"{self.features}, V = {self.vocabulary}"
        )


# 7B's widths, and the same proportions at a fourteenth of them for CPUs: heads of 64 instead of 128.
WIDTHS_OF_7B = (3584, 18944, 28, 4, 152064, 1280, 3420, 16)
GPU_SIZES = tuple(StepSize(4, 1024, 1024, layers, *WIDTHS_OF_7B) for layers in (4, 2))
CPU_SIZE = StepSize(4, 36, 64, 2, 256, 1376, 4, 1, 10880, 128, 344, 2)
SMALL_SIZE = StepSize(4, 16, 24, 1, 64, 128, 1, 1, 256, 32, 64, 1)


def step_case(size: StepSize, dtype: torch.dtype, device: torch.device, seed: int) -> Case:
    from benchmarks.training_step import Steps  # needs TRL, which a machine with a GPU may lack

    steps = Steps(size, dtype, device, seed)
    ours, scoring = steps.vgpo(vgpo_signal="loss"), steps.vgpo(vgpo_signal="scoring")
    peers = {
        TRL: steps.grpo(),
        SAME_HEAD: steps.vgpo(vgpo=None),
        OWN_PASS: scoring,
        ATTENTION: steps.vgpo(vgpo_signal="loss", signal="attention"),
        TRL_SCORES: steps.grpo(num_iterations=2),
        SAME_HEAD_SCORES: steps.vgpo(vgpo=None, num_iterations=2),
        VGPO_SCORES: steps.vgpo(num_iterations=2),
    }

    @cache
    def exact() -> tuple[torch.Tensor, torch.Tensor]:
        """TRL's step on advantages that are multiplied by the reference's factors."""
        trl = steps.grpo()
        with backend("reference"):
            trl.rollouts = steps.weighted_rollouts(scoring)
        return steps.step(trl)

    def check(found: tuple[torch.Tensor, torch.Tensor], bound: float) -> None:
        rounding = max(bound, EDGE, 4 * torch.finfo(dtype).eps)
        for name, value, expected in zip(("loss", "norm of the gradient"), found, exact(), strict=True):
            torch.testing.assert_close(
                value, expected, rtol=rounding, atol=EDGE, msg=lambda text, name=name: f"{name}: {text}"
            )

    length = 512 if device.type == "cpu" else 8192
    square = torch.ones(length, length, dtype=dtype, device=device)
    return Case(
        run=steps.runner(ours),
        check=check,
        ceiling=Ceiling("product", "flops", 2 * length**3, lambda: square @ square),
        bytes=steps.bytes,
        flops=steps.flops,
        peers={name: Peer(steps.runner(trainer), same=False) for name, trainer in peers.items()},
    )


def step_op(name: str, dtype: torch.dtype, cpu: tuple[StepSize, ...] = (), gpu: tuple[StepSize, ...] = ()) -> Op:
    return Op(
        name,
        step_case,
        cpu=cpu,
        gpu=gpu,
        small=SMALL_SIZE,
        dtypes=(dtype,),
        captured=False,
        least_rounds=5,
        in_turn=True,
    )


OPS = (
    (
        step_op("training step", torch.float32, cpu=(CPU_SIZE,)),
        step_op("training step at 7B's widths", torch.bfloat16, gpu=GPU_SIZES),
    )
    if installed("trl")
    else ()
)


def test_training_step(speed, setting) -> None:
    speed(setting)


# ---- shares ------------------------------------------------------------------------------------------------------

# Each way to read the signal, the step of TRL's that it stands beside, and that with our LM head.
COMPARED = {
    "the loss": (IN_THE_LOSS, TRL, SAME_HEAD),
    "a pass of its own": ((OWN_PASS,), TRL, SAME_HEAD),
    "the pass for old log-probs": ((VGPO_SCORES,), TRL_SCORES, SAME_HEAD_SCORES),
    "the loss, by attention": ((ATTENTION,), TRL, SAME_HEAD),
}


class Measured(NamedTuple):
    """Median ms and MiB of every implementation at one size, of the latest rows."""

    shape: str
    ms: dict[str, float]
    mib: dict[str, float]


class Share(NamedTuple):
    """What VGPO costs: of the time of TRL's step, of that with our LM head, and MiB beyond the latter's peak."""

    read_in: str
    of_trl: float
    of_same_head: float
    mib: float | None  # none where times are extrapolated


def read_steps(table: Path) -> list[Measured]:
    """Return the measured sizes of a table."""
    found: dict[tuple[str, ...], Measured] = {}
    with table.open(newline="") as file:
        for row in csv.DictReader(file):
            if not row["op"].startswith("training step") or row["implementation"].startswith("ceiling: "):
                continue
            key = row["device"], row["op"], row["shape"], row["dtype"]
            measured = found.setdefault(key, Measured(f"{row['shape']}, {row['dtype']}", {}, {}))
            measured.ms[row["implementation"]] = float(row["median_ms"])
            measured.mib[row["implementation"]] = float(row["peak_mib"] or "nan")
    return list(found.values())


def shares(measured: Measured) -> list[Share]:
    """Return what each way to read the signal costs, of those measured with both steps that it stands beside."""
    found = []
    for read_in, (names, trl, same_head) in COMPARED.items():
        name = next((name for name in names if name in measured.ms), None)
        if name is None or not {trl, same_head} <= measured.ms.keys():
            continue
        of_trl, of_same_head = (measured.ms[name] / measured.ms[base] - 1 for base in (trl, same_head))
        mib = measured.mib[name] - measured.mib[same_head] if measured.mib else None
        found.append(Share(read_in, of_trl, of_same_head, mib))
    return found


def extrapolated(measured: list[Measured]) -> Measured | None:
    """Return the times of all layers of 7B, on a straight line through those of two depths."""
    by_depth = {size.layers: found for size in GPU_SIZES for found in measured if found.shape.startswith(str(size))}
    if len(by_depth) < 2:
        return None
    (low, shallow), (high, deep) = sorted(by_depth.items())
    steps = {
        name: deep.ms[name] + (LAYERS_OF_7B - high) * (deep.ms[name] - shallow.ms[name]) / (high - low)
        for name in deep.ms
        if name in shallow.ms
    }
    return Measured(f"{LAYERS_OF_7B} layers, EXTRAPOLATED from {low} and {high}", steps, {})


def table_of(measured: list[Measured]) -> list[str]:
    """Lines of a table in Markdown."""
    whole = extrapolated(measured)
    lines = [
        "| step | signal read in | time beyond TRL's | beyond the same without VGPO | its peak beyond that |",
        "|---|---|---|---|---|",
    ]
    for found in measured if whole is None else [*measured, whole]:
        for read_in, *of_time, mib in shares(found):
            times = " | ".join(f"{100 * share:+.2f} %" for share in of_time)
            lines.append(f"| {found.shape} | {read_in} | {times} | {'' if mib is None else f'{mib:+.1f} MiB'} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table_of(read_steps(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "cpu.csv"))))
