"""How a trainer writes and reads checkpoints of vision-language models, where transformers' own way fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer

from vgpo_trainer.lora import dtypes_kept
from vgpo_trainer.runs.writing import writing
from vgpo_trainer.sharded import untrained_parameters_allowed
from vgpo_trainer.trl_surface import load_weights


class WithWeights(Trainer):
    """A trainer of TRL whose checkpoints can be gone on from."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with writing(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with untrained_parameters_allowed():
            super()._load_optimizer_and_scheduler(checkpoint)

    # save_pretrained may write weights by other names than the module's (LLaVA keeps those of its first release),
    # which from_pretrained maps back; Trainer would load them by name, find none and go on without.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        if self._is_plain(target):
            load_weights(target, resume_from_checkpoint)
        else:
            with dtypes_kept(self.model):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._is_plain(self.model):
            load_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _is_plain(self, model: nn.Module) -> bool:
        """Whether a checkpoint holds the whole model as from_pretrained reads it."""
        return isinstance(model, PreTrainedModel) and not self.is_fsdp_enabled and not self.is_deepspeed_enabled
