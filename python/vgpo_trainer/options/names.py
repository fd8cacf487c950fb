"""How options are called beside their fields' own names, and the defaults that differ from TRL's.

Read by the help as well, which waits for no library; so nothing is imported here.
"""

from __future__ import annotations

# Field of VGPOTrainingConfig or ModelConfig -> the shorter name of its option, and what the help says of it.
SHORT_NAMES = {
    "model_name_or_path": ("model", "model to train: hub id or folder"),
    "output_dir": ("out", "folder of the run"),
    "max_steps": ("steps", "optimisation steps; where given, they end the run whatever --epochs says"),
    "num_train_epochs": ("epochs", "passes over the dataset, where no --steps are given"),
    "per_device_train_batch_size": ("batch_size", "responses a process and micro-batch"),
    "gradient_accumulation_steps": ("accumulate", "micro-batches a step"),
    "num_generations": ("generations", "responses a prompt"),
    "beta": ("kl", "weight of the KL term"),
    "save_steps": ("save_every", "steps between two checkpoints"),
    "eval_steps": ("eval_every", "steps between two evaluations"),
    "lora_r": ("lora_rank", "train a LoRA adapter, of this rank; without the option all weights are trained"),
    "lora_target_modules": (
        "lora_targets",
        "linear layers of the decoder that the adapter is added to, q_proj say; default: all",
    ),
}
# Further fields that the help shows first.
OFTEN = ("max_completion_length", "learning_rate", "temperature", "seed", "dtype", "method", "vgpo", "signal")
OFTEN += ("reward_weights",)

# Options of our own -> what `trl grpo` calls them.
TRL_NAMES = {
    "dataset": "dataset_name",
    "split": "dataset_train_split",
    "eval_split": "dataset_test_split",
    "streaming": "dataset_streaming",
    "reward": "reward_funcs",
}

# Settings that `vgpo train` starts from where TRL starts from others.
DEFAULTS = {
    "num_train_epochs": 1.0,
    "save_steps": 50,
    "save_total_limit": 2,
    "eval_steps": 50,
}


def flags(name: str, *others: str) -> list[str]:
    """The spellings of an option: with hyphens, as the help shows it, and with underscores."""
    spellings: dict[str, None] = {}
    for each in (*others, name):
        spellings[f"--{each.replace('_', '-')}"] = None
        spellings[f"--{each}"] = None
    return list(spellings)
