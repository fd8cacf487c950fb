"""The same steps of VGPOTrainer without DeepSpeed and with it. Run under a launcher: ``deepspeed_case.py OUT``.

Imported for the names of its cases, it does not import DeepSpeed, which changes how accelerate and transformers treat
every model of a process.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# A launcher runs this file as a script, from anywhere.
_ROOT = Path(__file__).resolve().parents[2]
for _folder in ("tests", "python", "."):
    if str(_ROOT / _folder) not in sys.path:
        sys.path.insert(0, str(_ROOT / _folder))

import peft  # noqa: E402
import torch  # noqa: E402
from accelerate import DistributedType, PartialState  # noqa: E402
from torch import nn  # noqa: E402
from trainer.distributed_cases import evaluate, run_case  # noqa: E402
from trainer.tiny_runs import qwen2_5_vl  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from transformers.integrations.deepspeed import unset_hf_deepspeed_config  # noqa: E402
from vgpo_trainer.runs.writing import RunFailure  # noqa: E402

MICRO_BATCHES = 2  # of each process
# Small parameters too are cut.
STAGE_3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
SETTINGS = {
    # DeepSpeed's own optimisers want a compiler.
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": sys.maxsize,
    **dict.fromkeys(
        ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping"),
        "auto",
    ),
}
LORA = {"target_modules": ["q_proj"], "r": 4, "init_lora_weights": False}

# Each case: one of distributed_cases, and its settings. "zero": another stage; "loaded": by its name, so that DeepSpeed
# cuts the model while it is loaded; "tied": a model whose head is its embedding; "lora": an adapter; "sampled": the
# policy's own rollouts.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ZeRO-2": ("dapo", {"zero": {"stage": 2}}),
    "sampled, old log-probabilities": ("two iterations", {"sampled": True, "cast_lm_head_to_fp32": True}),
    "two views, loaded for ZeRO-3": ("two views", {"loaded": True}),
    "tied head, reference model": ("two iterations", {"tied": True, "loaded": True, "beta": 0.1}),
    "LoRA, two views": ("two views", {"lora": {**LORA, "modules_to_save": ["lm_head"]}, "view_detach": True}),
    "attention, TRL's head": ("dapo", {"signal": "attention", "fused_head": False}),
}


@contextmanager
def processors_taken_for_gpus() -> Iterator[None]:
    """Let accelerate use DeepSpeed on CPU processes, which it offers to accelerators only."""
    import deepspeed

    plain = PartialState._prepare_backend
    PartialState._prepare_backend = lambda self, *given, **named: ("gloo", DistributedType.MULTI_CPU)
    # Communication by shared memory would be compiled first.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        yield
    finally:
        PartialState._prepare_backend = plain


class KeepWeights(TrainerCallback):
    """Keeps the weights before and after each step, whole; whether ZeRO-3 had left them all empty; and who trains."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.empty: list[bool] = []
        self.kind = ""

    def on_train_begin(self, args, state, control, model=None, **_):
        import deepspeed

        named = {name.removeprefix("module."): weight for name, weight in model.named_parameters()}
        self.empty.append(all(weight.numel() == 0 for weight in named.values()))
        self.kind = args.distributed_state.distributed_type.name
        with deepspeed.zero.GatheredParameters(list(named.values())):
            self.steps.append({name: weight.detach().clone() for name, weight in named.items()})

    on_step_end = on_train_begin


class SpoilGradient(TrainerCallback):
    """Makes a gradient of the second step NaN."""

    def on_train_begin(self, args, state, control, model=None, **_):
        (weight,) = (weight for name, weight in model.named_parameters() if name.endswith("lm_head.weight"))
        weight.register_hook(lambda gradient: gradient * (torch.nan if state.global_step == 1 else 1.0))


def build(tied: bool) -> nn.Module:
    model, _ = qwen2_5_vl()
    if tied:
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
        model.tie_weights()
        assert model.lm_head.weight is model.get_input_embeddings().weight
    return model


def train(
    name: str, settings: dict[str, Any], processes: int, stage: dict[str, Any] | None, folder: Path
) -> dict[str, Any]:
    """Train without DeepSpeed (no stage) or with it; ``folder`` holds the models that are loaded."""
    settings, weights = dict(settings), KeepWeights()
    arguments: dict[str, Any] = {"callbacks": [weights]}
    if lora := settings.pop("lora", None):
        arguments["peft_config"] = peft.LoraConfig(**lora)
    if settings.pop("sampled", False):
        arguments["rollout_func"] = None
    if settings.pop("spoilt", False):
        arguments["callbacks"].append(SpoilGradient())
    tied = settings.pop("tied", False)
    settings["model"] = str(folder / str(tied)) if settings.pop("loaded", False) else build(tied)
    if stage is not None:
        settings |= {"use_cpu": False, "deepspeed": {**SETTINGS, "zero_optimization": stage}}
    torch.manual_seed(0)  # of adapters
    try:
        found = run_case(name, MICRO_BATCHES, processes, arguments=arguments, **settings)
    finally:
        unset_hf_deepspeed_config()
    return {"logged": found["logged"], **vars(weights)}


def failure(processes: int, folder: Path) -> str:
    """What a run says whose gradient is NaN."""
    try:
        train("two iterations", {"spoilt": True, "max_steps": 4}, processes, STAGE_3, folder)
    except RunFailure as error:
        return str(error)
    return "nothing"


def main(out: str) -> None:
    folder = Path(out).parent
    with processors_taken_for_gpus():
        processes = PartialState().num_processes
        with PartialState().main_process_first():
            if PartialState().is_main_process:
                for tied in (False, True):
                    build(tied).save_pretrained(folder / str(tied))
        # First everything without DeepSpeed: accelerate goes on using it where it was used.
        results: dict[str, Any] = {"evaluations": [evaluate(processes)]}
        for name, (case, settings) in CASES.items():
            plain = {key: value for key, value in settings.items() if key != "zero"}
            results[name] = [train(case, plain, processes, None, folder)]
        for name, (case, settings) in CASES.items():
            stage = settings.pop("zero", STAGE_3)
            results[name].append(train(case, settings, processes, stage, folder))
        results["failure"] = failure(processes, folder)
        configuration = {**SETTINGS, "zero_optimization": STAGE_3}
        results["evaluations"].append(evaluate(processes, use_cpu=False, deepspeed=configuration))
        unset_hf_deepspeed_config()
        if PartialState().is_main_process:
            torch.save({"processes": processes, "results": results}, out)
        PartialState().destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
