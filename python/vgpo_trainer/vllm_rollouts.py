"""Rollouts by vLLM are sampled from what is trained: the same prompts, and vision embeddings of the same weights.

TRL 1.16 fails in both, and nothing shows it but log-probabilities that disagree:

- **Prompts** (TRL #6294, colocate mode): TRL hands vLLM token ids in which each image has all of its tokens, together
  with the image. vLLM replaces the first of them by all, so it samples from a prompt with more image tokens than the
  policy is trained on. Here vLLM is handed a prompt as the chat template writes it, whose images have one token each,
  and what it makes of them is compared with TRL's prompt, token by token. Where the two still differ, the run ends.
- **Vision embeddings** (TRL #7198, both modes): vLLM keeps the embeddings of images that it has seen, and TRL has it
  forget prefixes after new weights, but not these. Here they are forgotten, too. What vLLM also keeps, preprocessed
  pixels, does not depend on weights and stays.

In server mode TRL sends whole prompts and the features of images, so that nothing is replaced; the number of features
is compared there. If TRL cures either, nothing here has to change: prompts that are not expanded pass as they are, and
an empty cache is emptied again.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any

from trl import GRPOTrainer
from trl.data_utils import prepare_multimodal_messages
from trl.generation.vllm_generation import VLLMGeneration

from vgpo_kernels.integrations.transformers import visual_token_ids
from vgpo_trainer.runs.writing import RunFailure
from vgpo_trainer.signals.reader import visual_tokens_told

_OTHER_PROCESSOR = (
    "vLLM makes the tokens of an image by the processor that lies with the model ({}), the trainer by its "
    "processing_class; save the latter beside the former, sizes of images included"
)


def runs_of(ids: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """Return the length of each run of one of ``tokens`` in a prompt, in order."""
    return [len(list(run)) for token, run in groupby(ids) if token in tokens]


def collapse(ids: Sequence[int], images: int, tokens: Sequence[int]) -> list[int]:
    """Return a prompt with one token in the place of each image's run.

    Args:
        ids: The prompt with all tokens of its images.
        images: The number of its images.
        tokens: Ids of visual tokens.

    Returns:
        The shorter prompt; the same where its images are no runs, one each: where two images adjoin, or a processor
        divides an image by rows.

    """
    if len(runs_of(ids, tokens)) != images:
        return list(ids)
    return [kept for token, run in groupby(ids) for kept in ([token] if token in tokens else run)]


def written_prompts(trainer: GRPOTrainer, prompts: Sequence[Any]) -> list[list[int]]:
    """Return the tokens of chats as the chat template writes them, before a processor expands images.

    Args:
        trainer: Whose template, tools and tokenizer they are.
        prompts: Lists of messages.

    """
    texts = trainer.processing_class.apply_chat_template(
        conversation=[prepare_multimodal_messages(prompt) for prompt in prompts],
        tools=trainer.tools or None,
        chat_template=trainer.chat_template,
        add_generation_prompt=True,
        tokenize=False,
        **trainer.chat_template_kwargs,
    )
    # As transformers has it where it tokenizes what it writes.
    start = trainer._tokenizer.bos_token
    begun = start is not None and texts[0].startswith(start)
    written: list[list[int]] = trainer._tokenizer(texts, add_special_tokens=not begun)["input_ids"]
    return written


class CheckedGeneration(VLLMGeneration):
    """TRL's engine or client of vLLM, with both faults mended and looked for.

    Attributes:
        visual_tokens: Ids of visual tokens.
        written: The latest prompts as their chat template writes them, by those that TRL made of them.

    """

    visual_tokens: tuple[int, ...]
    written: Mapping[tuple[int, ...], list[int]]
    _warned: set[str]

    def generate(self, prompts: list[list[int]], images: list[Any] | None, *rest: Any, **named: Any) -> Any:
        """TRL's, from the prompts that the policy is trained on.

        Raises:
            RunFailure: vLLM's prompt of a row with images differs from TRL's, or the number of its image features; or
                a row has visual tokens and no image.

        """
        shown = [len(row or ()) for row in images or [None] * len(prompts)]
        for row, (ids, number) in enumerate(zip(prompts, shown, strict=True)):
            if not number and (unseen := sum(runs_of(ids, self.visual_tokens))):
                raise RunFailure(
                    f"row {row} of a generation batch: its prompt has {unseen} image or video tokens, and TRL gives "
                    "vLLM images alone, of which it has none; train on videos with use_vllm=False"
                )
        if self.mode != "colocate":
            return super().generate(prompts, images, *rest, **named)
        handed = [self._short(ids, number) for ids, number in zip(prompts, shown, strict=True)]
        generated = super().generate(handed, images, *rest, **named)
        for row, (ids, seen, number) in enumerate(zip(prompts, generated[0], shown, strict=True)):
            # One token for each image already: a prompt that is not expanded, to which vLLM's says nothing.
            if number and runs_of(ids, self.visual_tokens) != [1] * number and list(ids) != list(seen):
                raise RunFailure(self._difference(row, ids, seen, number))
        return generated

    def _short(self, ids: list[int], images: int) -> list[int]:
        """Return the prompt of a row as vLLM expects it; one that tools have added to is no chat of the dataset."""
        return self.written.get(tuple(ids)) or (collapse(ids, images, self.visual_tokens) if images else ids)

    def _difference(self, row: int, ids: Sequence[int], seen: Sequence[int], images: int) -> str:
        counts = [sum(token in self.visual_tokens for token in prompt) for prompt in (seen, ids)]
        found = (
            f"row {row} of a generation batch ({images} image{'s' * (images > 1)}): vLLM samples from a prompt of "
            f"{len(seen)} tokens, {counts[0]} of them of images, and the policy is trained on {len(ids)} and "
            f"{counts[1]}"
        )
        if tuple(ids) in self.written:
            return f"{found} ({_OTHER_PROCESSOR.format(self.model.name_or_path)})"
        name = type(self.processing_class).__name__
        why = f"TRL #6294: it hands vLLM image tokens that are expanded already, which cannot be undone for {name}"
        return f"{found} ({why}; vllm_mode='server' expands nothing)"

    def _place_features(self, features: dict[str, Any] | None, prompt_ids: list[int]) -> Any:
        """TRL's, which puts the features of a server where the trainer's prompt has image tokens, however many."""
        placed = super()._place_features(features, prompt_ids)
        if features is None:
            return placed
        there, here = ([place["length"] for place in one["mm_placeholders"]["image"]] for one in (features, placed))
        written = self.written.get(tuple(prompt_ids))
        inputs = getattr(getattr(self.processing_class, "image_processor", None), "model_input_names", ())
        bare = "image_grid_thw" in inputs  # as Qwen has images, with no token around them that a server would count
        if written is None and not bare:
            return placed
        # All that takes the place of the one token that a template writes.
        expands = sum(here) if written is None else len(prompt_ids) - len(written) + len(here)
        if sum(there) != expands:
            found = f"the vLLM server has {there} tokens for the images of a prompt, the trainer {here}"
            if bare:
                raise RunFailure(f"{found} ({_OTHER_PROCESSOR.format(self.vllm_client.model)})")
            self._warn("features", f"{found}: watch sampling/sampling_logp_difference/mean, which should be near 0")
        return placed

    def sync_weights(self) -> None:
        """TRL's, after which vLLM computes the embeddings of images anew.

        Raises:
            RunFailure: The server failed to.

        """
        super().sync_weights()
        if self.mode == "colocate":
            reset = getattr(self.llm.llm_engine, "reset_encoder_cache", None)
            if reset is None:
                self._warn_of_stale("this vLLM has no LLMEngine.reset_encoder_cache")
            else:
                reset()
        elif self.accelerator.is_main_process:
            url = f"{self.vllm_client.base_url}/reset_encoder_cache"
            status = self.vllm_client.session.post(url).status_code
            if status == 404:
                self._warn_of_stale(f"the vLLM server has no {url}")
            elif status != 200:
                raise RunFailure(f"{url} answered {status}: vLLM may sample from vision embeddings of old weights")

    def _warn_of_stale(self, found: str) -> None:
        self._warn(
            "stale",
            f"{found}, so images that it has seen keep vision embeddings of old weights (TRL #7198): use vLLM 0.22 or "
            "later, or freeze the vision tower and its projector",
        )

    def _warn(self, kind: str, message: str) -> None:
        """Warn once of each kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=4)


def check_rollouts(trainer: GRPOTrainer, visual_tokens: Sequence[int] | None) -> None:
    """Make what a trainer generates with a :class:`CheckedGeneration`, in place.

    Args:
        trainer: A trainer with ``use_vllm``.
        visual_tokens: Ids of visual tokens, for a model whose configuration and processor do not say. Without any,
            prompts are compared, and their image tokens not counted.

    Raises:
        TypeError: Those given are no sequence of integers.
        ValueError: One is no token of the model.

    """
    tokens = visual_tokens_told(visual_tokens, trainer.model)
    if not tokens:
        with suppress(ValueError):
            tokens = visual_token_ids(trainer.model, trainer.processing_class)
    generation = trainer.vllm_generation
    generation.__class__ = CheckedGeneration
    generation.visual_tokens = tokens
    generation.written = {}
    generation._warned = set()


def remember_prompts(trainer: GRPOTrainer, prompts: Sequence[Any], expanded: Sequence[Sequence[int]]) -> None:
    """Keep prompts as their chat template writes them: vLLM is handed these, or counts from them.

    Args:
        trainer: A trainer with ``use_vllm``.
        prompts: Lists of messages with images, of one generation batch.
        expanded: The tokens that TRL makes of each.

    """
    generation = trainer.vllm_generation
    # With environments the tools of each prompt differ.
    if isinstance(generation, CheckedGeneration) and trainer.environment_factories is None:
        generation.written = dict(zip(map(tuple, expanded), written_prompts(trainer, prompts), strict=True))
