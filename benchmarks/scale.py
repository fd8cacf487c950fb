"""What VGPO costs and sends in a step at 8, 64 and 1,024 GPUs: the tables of docs/scale.md, from formulas.

    python benchmarks/scale.py                    # print the tables
    python benchmarks/scale.py --write            # into docs/scale.md, below its marks
    python benchmarks/scale.py --measure 1024     # first time verl's driver here, with so many responses

Times of kernels come from ``benchmarks/results/gpu.csv``, those of the driver from ``scale.csv``; everything else is a
formula of this file. ``--measure`` needs verl with its TransferQueue and Ray, and 10 MB of memory a response.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "scale.md"
DRIVER = RESULTS / "scale.csv"

# ---- what is assumed ---------------------------------------------------------------------------------------------

PROMPTS, PROMPT, IMAGE, RESPONSE = 512, 2048, 1024, 32768  # tokens: of a prompt, of its image, of a response
PEAK = 989e12  # bf16 FLOP/s of an H200 without sparsity
UTILISATION = 0.5  # of it, in training and scoring passes
HBM = 141e9  # bytes
NVLINK, NETWORK = 450e9, 50e9  # bytes a second and GPU, one way: within a node of 8, and between nodes (400 Gb/s)
NODE = 8
MICRO_BATCH = 2  # responses in a GPU's pass; in a group's, where it shares sequences or the head


@dataclass(frozen=True)
class Model:
    """A decoder's shape, as its configuration in transformers has it."""

    name: str
    features: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int = 152064
    head_size: int = 128
    rollout_gpus: int = 1  # that share a copy of the weights when tokens are sampled

    @property
    def matrices(self) -> int:
        """Parameters that every token is multiplied with: all but norms, biases and the embedding."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_size * self.features
        layer = attention + 3 * self.intermediate * self.features
        return self.layers * layer + self.vocabulary * self.features

    @property
    def parameters(self) -> int:
        return self.matrices + self.vocabulary * self.features

    @property
    def kv_bytes(self) -> int:
        """Keys and values of a token, bf16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_size

    def flops(self, context: float) -> float:
        """FLOPs of a token's forward pass: products with matrices, and with so many keys and values."""
        return 2 * self.matrices + 4 * self.layers * self.heads * self.head_size * context


SMALL = Model("7B", 3584, 28, 28, 4, 18944)
LARGE = Model("72B", 8192, 80, 64, 8, 29568, rollout_gpus=8)


@dataclass(frozen=True)
class Plan:
    """A run: a model, a number of GPUs, and the responses of a prompt."""

    model: Model
    gpus: int
    group: int

    @property
    def responses(self) -> int:
        return PROMPTS * self.group

    @property
    def sampled(self) -> int:
        """Response tokens of a step."""
        return self.responses * RESPONSE

    @property
    def tokens(self) -> int:
        return self.responses * (PROMPT + RESPONSE)

    @property
    def fits(self) -> bool:
        """Whether bf16 weights and gradients and fp32 masters and moments fit, 16 bytes a parameter."""
        return 16 * self.model.parameters < self.gpus * HBM

    @property
    def passes(self) -> float:
        """Passes of a GPU through the model in a step, each over a micro-batch, for data parallelism."""
        return self.responses / self.gpus / MICRO_BATCH


# ---- a step without VGPO -----------------------------------------------------------------------------------------


def rollout_seconds(plan: Plan) -> float:
    """Least time of sampling: every token reads keys and values, or one response the weights 32,768 times."""
    bandwidth = copy_rate()
    reads = plan.sampled * (PROMPT + RESPONSE / 2) * plan.model.kv_bytes / (plan.gpus * bandwidth)
    one_response = RESPONSE * 2 * plan.model.matrices / (plan.model.rollout_gpus * bandwidth)
    return max(reads, one_response)


def pass_seconds(plan: Plan) -> float:
    """Time of one forward pass over the batch."""
    flops = plan.tokens * plan.model.flops((PROMPT + RESPONSE) / 2)
    return flops / (plan.gpus * PEAK * UTILISATION)


def step_seconds(plan: Plan) -> tuple[float, float, float]:
    """Sampling, scoring (one forward pass) and updating (forward, again for checkpointing, and backward)."""
    forward = pass_seconds(plan)
    return rollout_seconds(plan), forward, 4 * forward


def fsdp_bytes(plan: Plan) -> float:
    """What FSDP2 sends and receives on a GPU: bf16 weights of one scoring pass, those of two and gradients of one."""
    return plan.passes * 4 * 2 * plan.model.parameters


def link(plan: Plan) -> float:
    """Bytes a second of a GPU between all of them."""
    return NVLINK if plan.gpus <= NODE else NETWORK


# ---- what VGPO adds ----------------------------------------------------------------------------------------------


def focus_seconds(plan: Plan) -> float:
    """visual_focus on each GPU: rows of image and response are read once, at the measured rate."""
    moved = plan.responses * (IMAGE + RESPONSE) * plan.model.features * 2
    return moved / plan.gpus / gpu_row("visual_focus", "2 x 33792")["gb_per_s"] / 1e9


# Bytes of a response token that the driver of verl 0.9.1 fetches and puts, by field; those of prompts are left out.
FETCHED = {
    "old log-probs": {"entropy": 4, "log_probs": 4, "response_mask": 8, "responses": 8, "rollout_log_probs": 4},
    "advantages": {"response_mask": 8, "rm_scores": 4, "rollout_log_probs": 4, "old_log_probs": 4},
    "metrics": {"responses": 8, "response_mask": 8, "advantages": 4, "returns": 4, "rm_scores": 4},
    "VGPO": {"response_mask": 8, "visual_focus": 4, "advantages": 4},
}
PUT = {
    "old log-probs": {"old_log_probs": 4, "entropy": 4},
    "advantages": {"advantages": 4, "returns": 4},
    "metrics": {},
    "VGPO": {"advantages": 4},
}
# What the driver holds of a token when it re-weights: the fields, the focus without prompts, a bool mask, psi, w,
# factors and the new advantages.
HELD = sum(FETCHED["VGPO"].values()) + 4 + 1 + 3 * 4 + 4
PARTS = {"fetch": "fetch the fields", "cut": "cut off prompts", "reweight": "re-weight", "put": "put advantages back"}
OF_REWEIGHT = {"weights": "of it `visual_weights`"}
OF_SCORES = {"fetch scores": "fetch scores and uids", "group": "`group_weights`", "put phi": "put phi"}


def seconds_of(part: str, plan: Plan) -> float:
    """Time of a part of the driver's work, at the measured time of a response."""
    row = driver_rows()[part]
    return plan.responses * row["seconds"] / row["responses"]


def driver_seconds(plan: Plan) -> float:
    """What VGPO adds to verl's driver in a step."""
    return sum(seconds_of(part, plan) for part in PARTS)


def transfer_seconds(plan: Plan, of: str) -> float:
    """What the driver fetches and puts for a purpose, at the bytes a second that were measured."""
    rows = driver_rows()
    return sum(
        plan.sampled * sum(fields[of].values()) * rows[part]["seconds"] / rows[part]["bytes"]
        for part, fields in (("fetch", FETCHED), ("put", PUT))
    )


def own_driver_seconds(plan: Plan) -> float:
    """What verl's driver fetches and puts without VGPO."""
    return sum(transfer_seconds(plan, of) for of in FETCHED if of != "VGPO")


@dataclass(frozen=True)
class Traffic:
    """What a GPU sends in a step because of VGPO, beside what that kind of parallelism sends by itself."""

    kind: str
    what: str
    collectives: float
    bytes: float
    rate: float  # bytes a second
    own: float  # bytes


def traffic(plan: Plan) -> list[Traffic]:
    """Return the traffic of each kind of parallelism; groups that share sequences or a head are nodes of eight."""
    model, ranks = plan.model, NODE
    responses = plan.responses / plan.gpus * ranks  # of a group
    passes = responses / MICRO_BATCH
    tokens, sampled = responses * (PROMPT + RESPONSE), responses * RESPONSE
    heads = 2 * (model.heads + model.kv_heads) * model.head_size  # q, k, v and what attention returns
    # All-to-all of every layer, in four passes' worth: scoring, forward twice (checkpointing) and backward.
    ulysses = 4 * model.layers * tokens / ranks * heads * 2 * (ranks - 1) / ranks
    # All-reduce of two results of every layer likewise, 2 (R - 1) / R of a tensor each.
    tensor = 4 * model.layers * 2 * tokens * model.features * 2 * 2 * (ranks - 1) / ranks
    one = tokens / ranks * 4
    return [
        Traffic("data, FSDP2", "a focus per token, to storage", 0, one, NETWORK, fsdp_bytes(plan)),
        Traffic(
            "Ulysses, ring",
            "sums [D] to every rank, then an all-reduce of cosines",
            2 * passes,
            (ranks - 1) * (responses * model.features * 4 + 2 * tokens / ranks * 4),
            NVLINK,
            ulysses,
        ),
        Traffic(
            "that, all gathered",
            "hidden states, to every rank",
            passes,
            (ranks - 1) * tokens / ranks * model.features * 2,
            NVLINK,
            ulysses,
        ),
        Traffic(
            "a split head",
            "four numbers per scored token, in scoring and update",
            2 * passes,
            2 * (ranks - 1) * sampled * 16,
            NVLINK,
            tensor,
        ),
        Traffic("pipeline", "a focus per token, from the last stage", 0, one, NETWORK, 0),
    ]


# ---- measured ----------------------------------------------------------------------------------------------------


@cache
def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def gpu_row(op: str, shape: str) -> dict[str, float]:
    """Time and rate of the newest row of a CUDA kernel, or of the copy, whose shape begins like this."""
    rows = [row for row in read(RESULTS / "gpu.csv") if row["op"] == op and row["shape"].startswith(shape)]
    row = [row for row in rows if row["implementation"] in ("cuda", "ceiling: copy")][-1]
    return {name: float(row[name]) for name in ("ms", "gb_per_s")}


def copy_rate() -> float:
    """Bytes a second of a copy on the GPU, read and written."""
    return gpu_row("ceiling", "536870912")["gb_per_s"] * 1e9


def driver_rows() -> dict[str, dict[str, float]]:
    """The newest row of each part of the driver's work."""
    numbers = ("responses", "bytes", "seconds")
    return {row["part"]: {name: float(row[name]) for name in numbers} for row in read(DRIVER)}


def measure(responses: int, rounds: int) -> list[dict[str, Any]]:
    """Time what VGPO adds to verl's driver, by the calls of the adapter, the fastest of some rounds.

    Storage units are processes of this machine that keep the fields in memory, as verl's do unless told otherwise.
    """
    import ray
    import torch
    import transfer_queue
    from omegaconf import OmegaConf
    from tensordict import TensorDict
    from verl.workers.utils.padding import response_from_nested

    from benchmarks import measure as measuring
    from vgpo_kernels import VGPOConfig, group_weights, visual_weights
    from vgpo_kernels.integrations.surface import reweight

    def nested(values: Any) -> Any:
        return torch.nested.nested_tensor_from_jagged(values, torch.arange(responses + 1) * (len(values) // responses))

    uids = [f"prompt {index // 8}" for index in range(responses)]
    groups = torch.arange(responses) // 8
    fields = {
        "response_mask": nested(torch.ones(responses * RESPONSE, dtype=torch.int64)),
        "visual_focus": nested(torch.rand(responses * (PROMPT + RESPONSE))),
        "advantages": nested(torch.randn(responses * RESPONSE)),
    }
    place: dict[str, Any] = {"keys": [str(index) for index in range(responses)], "partition_id": "train"}
    best: dict[str, tuple[float, int]] = {}

    def timed(part: str, moved: int, run: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = run(*arguments, **options)
        seconds = time.perf_counter() - start
        best[part] = min(best.get(part, (seconds, moved)), (seconds, moved))
        return result

    def put(**chosen: Any) -> Any:
        return transfer_queue.kv_batch_put(**place, fields=TensorDict(chosen, batch_size=responses))

    def get(*names: str) -> Any:
        return transfer_queue.kv_batch_get(**place, select_fields=list(names))

    per_token, config = 4 * responses * RESPONSE, VGPOConfig.paper()
    with tempfile.TemporaryDirectory() as folder:
        ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        transfer_queue.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 2}}}))
        put(**fields, score=torch.rand(responses), group=groups)
        for _ in range(rounds):
            data = timed("fetch", sum(one.values().nbytes for one in fields.values()), get, *fields)
            mask, advantages = data["response_mask"], data["advantages"]
            cos = timed("cut", per_token, response_from_nested, data["visual_focus"], mask)
            tensors, layout = (advantages.values(), cos.values(), mask.values()), {"cu_seqlens": mask.offsets()}
            found, _ = timed("reweight", per_token, reweight, *tensors, uids, config, **layout)
            weighted = torch.nested.nested_tensor_from_jagged(found, advantages.offsets())
            valid = mask.values().bool()
            timed("weights", per_token, visual_weights, cos.values(), valid, groups, config, **layout)
            timed("put", per_token, put, advantages=weighted)
            scores = timed("fetch scores", 12 * responses, get, "score", "group")
            phi = timed("group", 12 * responses, group_weights, scores["score"].flatten(), groups, config)
            timed("put phi", 4 * responses, put, phi=phi)
        transfer_queue.close()
        ray.shutdown()
    shared = {
        "date": date.today().isoformat(),
        "commit": measuring.commit(),
        "device": measuring.device_name(torch.device("cpu")),
        "responses": responses,
    }
    return [
        shared | {"part": part, "bytes": moved, "seconds": f"{seconds:.4g}"} for part, (seconds, moved) in best.items()
    ]


def record(rows: list[dict[str, Any]]) -> None:
    """Append rows to the table of the driver."""
    with DRIVER.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)
    read.cache_clear()


# ---- the tables --------------------------------------------------------------------------------------------------

PLANS = [
    *(Plan(SMALL, gpus, group) for gpus in (8, 64, 1024) for group in (8, 16)),
    *(Plan(LARGE, gpus, group) for gpus in (8, 64, 1024) for group in (8, 16)),
]


def table(head: str, rows: Iterable[Sequence[str]]) -> str:
    """Return a table of Markdown; ``head`` is its first line, cells divided by bars."""
    lines = [head, "|".join(["", *("---" for _ in head.split("|")[1:-1]), ""])]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def digits(value: float) -> str:
    """Spell a number with two digits, or all before the point."""
    if value == 0:
        return "0"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(1 - math.floor(math.log10(value)), 0)}f}"


def percent(share: float) -> str:
    return f"{digits(100 * share)}%"


def of_steps() -> str:
    def row(plan: Plan) -> list[str]:
        rollout, scoring, update = step_seconds(plan)
        driver, whole = driver_seconds(plan), rollout + scoring + update
        times = (rollout, scoring, update, 1e3 * focus_seconds(plan), driver)
        shares = (focus_seconds(plan) / whole, driver / whole, own_driver_seconds(plan) / whole)
        return [plan.model.name, f"{plan.gpus:,}", str(plan.group), *map(digits, times), *map(percent, shares)]

    return table(
        "| | GPUs | G | sampling, s | scoring, s | update, s | focus, ms | driver, s | focus | driver | verl's own |",
        [row(plan) for plan in PLANS if plan.fits],
    )


def of_traffic() -> str:
    def rows(plan: Plan) -> list[list[str]]:
        found = []
        for one in traffic(plan):
            own, share = (f"{digits(one.own / 1e9)}", percent(one.bytes / one.own)) if one.own else ("", "")
            moved = digits(one.bytes / 1e6), digits(1e3 * one.bytes / one.rate)
            label = f"{plan.model.name}, {plan.gpus:,}"
            found.append([label, one.kind, one.what, digits(one.collectives), *moved, own, share])
        return found

    return table(
        "| | parallelism | VGPO sends | collectives | MB | ms | by itself, GB | share |",
        [row for plan in (Plan(SMALL, 64, 8), Plan(LARGE, 1024, 16)) for row in rows(plan)],
    )


def of_fields() -> str:
    def row(of: str) -> list[str]:
        named = ", ".join(f"`{name}` {size}" for name, size in FETCHED[of].items())
        moved = sum(FETCHED[of].values()), sum(PUT[of].values())
        seconds = (transfer_seconds(Plan(SMALL, 1024, group), of) for group in (8, 16))
        return [of, named, *map(str, moved), *map(digits, seconds)]

    return table("| | fetched, bytes of a token | in all | put | G = 8, s | G = 16, s |", map(row, FETCHED))


def of_driver() -> str:
    def row(part: str, named: str) -> list[str]:
        measured = driver_rows()[part]
        rate = f"{measured['bytes'] / measured['seconds'] / 1e9:.2f} GB/s" if part in ("fetch", "put") else ""
        if part in ("cut", "reweight", "weights"):
            rate = f"{measured['bytes'] / 4 / measured['seconds'] / 1e6:.0f} million tokens/s"
        seconds = [measured["seconds"], *(seconds_of(part, Plan(SMALL, 1024, group)) for group in (8, 16))]
        return [named, rate, *map(digits, seconds)]

    parts = ["fetch", "cut", "reweight", "weights", "put", *OF_SCORES]
    named = PARTS | OF_REWEIGHT | OF_SCORES
    measured = int(driver_rows()["fetch"]["responses"])
    head = f"| | rate | measured, {measured:,} responses, s | G = 8, s | G = 16, s |"
    return table(head, [row(part, named[part]) for part in parts])


TABLES = {"steps": of_steps, "traffic": of_traffic, "fields": of_fields, "driver": of_driver}


def filled(page: str) -> str:
    """Return a page with every table that it marks, ``<!-- table: NAME -->``, as the formulas say now."""
    for name, make in TABLES.items():
        mark = f"<!-- table: {name} -->\n"
        assert mark in page, f"the page has no {mark.strip()}"
        before, _, after = page.partition(mark)
        page = before + mark + make() + "\n" + re.sub(r"\A(\|.*\n)*", "", after)
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", type=int, metavar="RESPONSES", help="measure verl's driver with so many first")
    parser.add_argument("--rounds", type=int, default=5, help="of which the fastest counts")
    parser.add_argument("--write", action="store_true", help=f"write the tables into {PAGE.relative_to(ROOT)}")
    chosen = parser.parse_args(arguments)
    if chosen.measure:
        record(measure(chosen.measure, chosen.rounds))
    if chosen.write:
        PAGE.write_text(filled(PAGE.read_text()))
    else:
        print("\n\n".join(f"{name}\n\n{make()}" for name, make in TABLES.items()))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    main()
