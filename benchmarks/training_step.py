"""A training step of TRL's GRPOTrainer and of VGPOTrainer on the same model, rollouts and optimizer.

A step is all that a trainer does with a generation batch whose rollouts are given: what VGPO adds to it (groups,
records, factors, a forward pass of its own where the signal is read in one), ``training_step``, clipping of gradients,
and AdamW. Nothing is generated, and no image is preprocessed. Settings are the trainers' defaults, gradient
checkpointing included, but that numbers are in one dtype throughout. All trainers share one model and one AdamW with a
learning rate of 0: every step does the same work on the same memory, whoever does it.

The model is a Qwen2.5-VL of random weights. ``layers`` cuts its decoder and its vision tower alike; every layer of the
tower attends to the whole image, as one in eight does at 7B, because windows are slow without flash-attention and would
make VGPO's share small.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import transformers
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from vgpo_trainer.config import VGPOTrainingConfig
from vgpo_trainer.trainer import VGPOTrainer
from vgpo_trainer.trl_surface import FORWARD_INPUTS, Sequences

from benchmarks.bench_training_step import StepSize

PAD, END, VISION_START, VISION_END, IMAGE, VIDEO = range(6)
WORDS = 16  # tokens of text after the image
PATCH = 3 * 2 * 14 * 14  # numbers in a patch


def build_model(size: StepSize, dtype: torch.dtype, device: torch.device) -> Any:
    """Build a Qwen2.5-VL of random weights."""
    third = size.features // size.heads // 16
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": size.vocabulary,
            "hidden_size": size.features,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.key_heads,
            "max_position_embeddings": 2 * (size.image + size.response),
            "rope_parameters": {"rope_type": "default", "mrope_section": [2 * third, 3 * third, 3 * third]}
            | {"rope_theta": 1e6},
            "pad_token_id": PAD,
            "eos_token_id": END,
            "bos_token_id": None,
        },
        vision_config={
            "depth": size.layers,
            "hidden_size": size.vision_features,
            "intermediate_size": size.vision_intermediate,
            "out_hidden_size": size.features,
            "num_heads": size.vision_heads,
            "fullatt_block_indexes": list(range(size.layers)),
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(device):
        torch.manual_seed(0)
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    model.generation_config = transformers.GenerationConfig(pad_token_id=PAD, eos_token_id=END)
    return model


def draw_rollouts(size: StepSize, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Any]:
    """Draw a generation batch as TRL makes it: one prompt with an image, and responses of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    batch, side = size.batch, 2 * round(size.image**0.5)
    pixels = torch.randn(side * side, PATCH, generator=generator).repeat(batch, 1)
    words = torch.randint(VIDEO + 1, size.vocabulary, (WORDS,), generator=generator)
    image = [VISION_START, *[IMAGE] * size.image, VISION_END]
    prompts = torch.tensor([*image, *words.tolist()]).repeat(batch, 1)
    lengths = torch.linspace(0.7 * size.response, size.response, batch).round().long()
    mask = torch.arange(size.response) < lengths[:, None]
    responses = torch.randint(VIDEO + 1, size.vocabulary, mask.shape, generator=generator).masked_fill(~mask, PAD)
    tokens = torch.cat([prompts, responses], dim=1)
    rewards = torch.arange(batch) % 2 * 1.0
    arrays = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": responses,
        "completion_mask": mask.long(),
        "advantages": (rewards - rewards.mean()) / rewards.std(),
        "num_items_in_batch": mask.sum(),
        "pixel_values": pixels.to(dtype),
        "image_grid_thw": torch.tensor([[1, side, side]]).repeat(batch, 1),
        "mm_token_type_ids": (tokens == IMAGE).long(),
    }
    return {name: array.to(device) for name, array in arrays.items()} | {"num_images": [1] * batch}


class GivenRollouts(GRPOTrainer):
    """TRL's trainer, but a generation batch is at hand before anything is generated."""

    rollouts: ClassVar[dict[str, Any]] = {}

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = dict(self.rollouts)
        self._calculate_rewards(inputs, inputs, [], [])
        # As TRL has it: where the policy has moved on before a rollout is used for the last time.
        if self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations):
            checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
            with torch.no_grad(), checkpointing:
                ids, mask, responses = Sequences.of(batch)
                named = {name: batch.get(name) for name in FORWARD_INPUTS}
                batch["old_per_token_logps"] = self._get_per_token_logps_and_entropies(
                    self.model, ids, mask, responses.shape[1], self.args.per_device_train_batch_size, **named
                )[0]
        return batch

    def _calculate_rewards(self, inputs: Any, *rest: Any) -> Tensor:
        return torch.zeros(len(inputs), 1, device=self.accelerator.device)


class GivenRolloutsVGPO(VGPOTrainer, GivenRollouts):
    """VGPOTrainer likewise; what it does around TRL's generation is done."""


class Steps:
    """Trainers that share a model, an optimizer and rollouts, and their steps."""

    def __init__(self, size: StepSize, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.size, self.device = size, device
        self.model = build_model(size, dtype, device).train()
        self.rollouts = draw_rollouts(size, dtype, device, seed)
        weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=0.0, weight_decay=0.0, fused=True)
        words = {f"w{index}": index for index in range(size.vocabulary)}
        self.tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w1"
        )
        self.rows = [{"prompt": "w7", "images": [Image.new("RGB", (28, 28))]} for _ in range(size.batch)]
        self.folder = tempfile.TemporaryDirectory()

    def trainer(self, kind: type[GRPOTrainer], config: type[GRPOConfig], **settings: Any) -> Any:
        """Make a trainer of the model; what it does to the model's ``forward`` is kept beside it."""
        self.model.__dict__.pop("forward", None)
        arguments = config(
            output_dir=self.folder.name,
            per_device_train_batch_size=self.size.batch,
            num_generations=self.size.batch,
            bf16=False,
            use_cpu=self.device.type == "cpu",
            report_to="none",
            **settings,
        )
        made = kind(
            self.model,
            lambda **_: [],
            arguments,
            Dataset.from_list([{"prompt": "w7"}] * self.size.batch),
            processing_class=self.tokenizer,
            optimizers=(self.optimizer, None),
        )
        made.rollouts = self.rollouts
        made.current_gradient_accumulation_steps = 1
        made.forward_of_model = self.model.forward
        return made

    def grpo(self, **settings: Any) -> Any:
        return self.trainer(GivenRollouts, GRPOConfig, **settings)

    def vgpo(self, **settings: Any) -> Any:
        return self.trainer(GivenRolloutsVGPO, VGPOTrainingConfig, **settings)

    def begin(self, trainer: Any) -> None:
        """Let a trainer start on a new generation batch, which is always shuffled alike."""
        self.model.forward = trainer.forward_of_model
        trainer._step = 0
        torch.manual_seed(0)

    def step(self, trainer: Any) -> tuple[Tensor, Tensor]:
        """Do one optimisation step; return loss and norm of the gradient."""
        self.begin(trainer)
        loss = trainer.training_step(self.model, self.rows, None)
        norm = trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, norm

    def runner(self, trainer: Any) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: self.step(trainer)

    def weighted_rollouts(self, scoring: Any) -> dict[str, Any]:
        """Return the rollouts with their factors in the advantages, by a trainer whose pass knows them early."""
        self.begin(scoring)
        batch = dict(scoring._prepare_inputs(self.rows))
        batch["advantages"] = batch["advantages"][:, None] * batch.pop("visual_factors")
        batch.pop("old_per_token_logps", None)
        return batch

    @property
    def matrices(self) -> tuple[int, int, int]:
        """Numbers in the matrices of decoder, LM head and vision tower that tokens are multiplied by."""
        head = self.model.get_output_embeddings().weight
        sizes = {
            part: sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)
            for part, module in (
                ("decoder", self.model.model.language_model.layers),
                ("vision", self.model.model.visual),
            )
        }
        return sizes["decoder"], head.numel(), sizes["vision"]

    @property
    def flops(self) -> int:
        """Operations of the products with weights in a forward and a backward pass; attention is not counted."""
        decoder, head, vision = self.matrices
        ids, _, responses = Sequences.of(self.rollouts)
        patches = self.rollouts["pixel_values"].shape[0]
        return int(6 * (decoder * ids.numel() + head * responses.sum() + vision * patches))

    @property
    def bytes(self) -> int:
        """Bytes of weights and gradients: read in two passes, written, and read and written by AdamW."""
        return 10 * sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
