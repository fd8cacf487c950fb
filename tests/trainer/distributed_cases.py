"""The same rollouts trained on in different arrangements. Run under a launcher, or imported for one process.

``distributed_cases.py OUT`` writes, for each case, the loss and the gradients of its optimisation steps.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# A launcher runs this file as a script, from anywhere.
_ROOT = Path(__file__).resolve().parents[2]
for _folder in ("tests", "python", "."):
    if str(_ROOT / _folder) not in sys.path:
        sys.path.insert(0, str(_ROOT / _folder))

import torch  # noqa: E402
from accelerate import DistributedType, PartialState  # noqa: E402
from trainer.tiny_runs import make_trainer, rows  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from trl import GRPOTrainer  # noqa: E402
from vgpo_trainer.runs.writing import RunFailure  # noqa: E402

RESPONSES = 24
GENERATIONS = 8  # three prompts; two processes of twelve responses each share the second
COMPLETION_LENGTH = 10

# What a spoilt view of rows looks like must not depend on the rows beside them, if arrangements are to train alike.
VIEWS = {"loss_type": "dapo", "signal": "dependency", "view": "blank", "view_coef": 0.1}
# Settings of each case beside its arrangement.
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "released": {"loss_type": "dapo", "vgpo": "released"},
    # The rows of one process have an image, those of the other are text.
    "text on one process": {"loss_type": "dapo", "num_generations": 12, "images": [1, 0]},
    "two iterations": {"loss_type": "dapo", "num_iterations": 2, "max_steps": 2},
    "two views": VIEWS,
    "two views of sequences, and text": {**VIEWS, "loss_type": "grpo", "num_generations": 12, "images": [1, 0]},
    # Methods that compare responses, select within them and select among all; the second fades in from the second step.
    "vppo": {"loss_type": "dapo", "method": "vppo", "view": "blank"},
    "pepo": {"loss_type": "grpo", "method": "pepo", "max_steps": 2},
    "vepo": {"loss_type": "dapo", "method": "vepo", "view": "blank"},
    "vepo of sequences, and text": {
        "loss_type": "grpo",
        "method": "vepo",
        "view": "blank",
        "num_generations": 12,
        "images": [1, 0],
    },
    "tor": {"loss_type": "dapo", "method": "tor"},
}


SPREAD = ("vgpo/phi_std", "vgpo/weight_std")  # of VGPO, and of another method


def scripted_rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """Completions that depend on a response's place in the global batch alone, not on who generates it."""
    prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
    first = trainer.accelerator.process_index * len(prompts)
    completions = []
    for place in range(first, first + len(prompts)):
        generator = torch.Generator().manual_seed(place)
        length = int(torch.randint(2, COMPLETION_LENGTH, (), generator=generator))
        # Digits and signs of the tiny tokenizer, then its end of sequence.
        completions.append([*torch.randint(7, 20, (length,), generator=generator).tolist(), 1])
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": completions,
        "logprobs": [[0.0] * len(completion) for completion in completions],
    }


def token_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(completion) % 5) for completion in completion_ids]


class KeepGradients(TrainerCallback):
    """Keeps the gradients that reach the optimiser, as plain tensors by parameter."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        named = model.named_parameters()
        self.steps.append({name: whole(weight.grad).clone() for name, weight in named if weight.grad is not None})


def whole(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient that FSDP left sharded, gathered."""
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


@contextmanager
def processes_taken_for_gpus() -> Iterator[None]:
    """Let accelerate shard a model over CPU processes, which it offers to GPUs only."""
    plain = PartialState.__init__

    def taken_for_gpu(self, *arguments, **named):
        plain(self, *arguments, **named)
        if self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = taken_for_gpu
    try:
        yield
    finally:
        PartialState.__init__ = plain


SHARDED = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"]},
}


def run_case(
    name: str, micro_batches: int, processes: int = 1, *, arguments: dict[str, Any] | None = None, **settings: Any
) -> dict[str, Any]:
    """Train on the scripted rollouts, cut into ``micro_batches`` on each of ``processes``.

    ``arguments`` are further ones of the trainer.
    """
    gradients = KeepGradients()
    settings = {**CASES[name], **settings}
    images = settings.pop("images", [1, 2, 1])
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            folder,
            family="qwen2_5_vl",
            dataset=rows(images, size=16),
            reward=token_reward,
            arguments={"rollout_func": scripted_rollout, "callbacks": [gradients], **(arguments or {})},
            **{
                "per_device_train_batch_size": RESPONSES // (micro_batches * processes),
                "gradient_accumulation_steps": micro_batches,
                "num_generations": GENERATIONS,
                "max_completion_length": COMPLETION_LENGTH,
                "max_steps": 1,
                "max_grad_norm": 0.0,
                "optim": "sgd",
                "learning_rate": 0.1,
                "lr_scheduler_type": "constant",
                "shuffle_dataset": False,
                "rollout_samples": 0,
                **settings,
            },
        )
        trainer.train()
        kinds = {type(weight).__name__ for weight in trainer.model.parameters()}
        logged = [record for record in trainer.state.log_history if "loss" in record]
    return {
        "loss": [record["loss"] for record in logged],
        "spread": [record[name] for record in logged for name in SPREAD if record.get(name) is not None],
        "gradients": gradients.steps,
        "kinds": kinds,
        "logged": logged,
    }


def logs_beside_trls(micro_batches: int, processes: int) -> dict[str, list[dict[str, float]]]:
    """What VGPOTrainer logs with factors of 1, and TRL's trainer, of a step off the policy that generated."""
    settings = {"loss_type": "grpo", "num_iterations": 2, "max_steps": 2, "epsilon": 0.005, "entropy_coef": 0.01}
    kinds = {"ours": {"vgpo_intra": False, "vgpo_inter": False}, "trl's": {"trainer_class": GRPOTrainer}}
    return {
        kind: run_case("grpo", micro_batches, processes, **settings, **more)["logged"] for kind, more in kinds.items()
    }


def evaluate(processes: int, **settings: Any) -> dict[str, Any]:
    """Evaluate with groups that straddle processes; the groups and answers of each batch, over all processes."""
    batches = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            folder,
            family="qwen2_5_vl",
            reward=token_reward,
            arguments={"rollout_func": scripted_rollout, "eval_dataset": rows([1] * 5, size=16)},
            per_device_eval_batch_size=6 // processes,
            num_generations_eval=2,
            rollout_samples=0,
            **settings,
        )
        plain = trainer._generate_and_score_completions

        def keeping(inputs):
            batch = plain(inputs)
            answers = torch.tensor([int(row["answer"]) for row in inputs])
            together = torch.stack([batch["prompt_group"], answers], dim=1)
            batches.append(trainer.accelerator.gather(together).tolist())
            return batch

        trainer._generate_and_score_completions = keeping
        metrics = trainer.evaluate()
    return {"batches": batches, "phi_std": metrics["eval_vgpo/phi_std"]}


def refused_mixture(micro_batches: int, processes: int) -> str:
    """What a sharded model says of rows with and without images."""
    try:
        run_case("text on one process", micro_batches, processes, **SHARDED)
    except RunFailure as error:
        return str(error)
    return "nothing"


def refused_split() -> dict[str, str]:
    """What the trainer says where the configuration of a launcher splits sequences over both processes."""
    found = {}
    for kind, settings in (("SP", {}), ("CP", SHARDED)):
        launcher = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", f"PARALLELISM_CONFIG_{kind}_SIZE": "2"}
        os.environ.update(launcher)
        try:
            run_case("dapo", 1, 2, **settings)
        except ValueError as error:
            found[kind] = str(error)
        finally:
            for name in launcher:
                del os.environ[name]
    return found


def main(out: str) -> None:
    processes = PartialState(cpu=True).num_processes
    micro_batches = 4 // processes
    results = {name: run_case(name, micro_batches, processes) for name in CASES}
    results["evaluation"] = evaluate(processes)
    results["swapped"] = run_case("two views", micro_batches, processes, view="swap")
    results["logs"] = logs_beside_trls(micro_batches, processes)
    with processes_taken_for_gpus():
        results["refused split"] = refused_split()
        results["sharded"] = run_case("dapo", micro_batches, processes, **SHARDED)
        results["sharded views"] = run_case("two views", micro_batches, processes, **SHARDED)
        results["refused"] = refused_mixture(micro_batches, processes)
    state = PartialState()
    if state.is_main_process:
        torch.save({"processes": processes, "results": results}, out)
    state.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
