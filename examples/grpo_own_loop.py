"""GRPO with VGPO in plain transformers and torch: sample, reward, compare within groups, weigh, update. No trainer.

::

    python examples/grpo_own_loop.py
    torchrun --nproc-per-node 2 examples/grpo_own_loop.py --accumulation 1
    python examples/grpo_own_loop.py --model Qwen/Qwen2.5-VL-3B-Instruct --learning-rate 1e-6 --max-new-tokens 256

The first trains the demo's model of 1.3 million parameters to add up handwritten digits, in about a minute on two
cores. The second prints the same numbers from two processes. The third needs a GPU. For a task of your own, change
``draw_prompts`` and ``reward``; for images and questions of a dataset, that is all.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForImageTextToText, AutoProcessor
from vgpo_trainer.demo.digits import PROMPT, make_problems
from vgpo_trainer.demo.warm_start import SHIPPED

from vgpo_kernels import PolicyLoss, VGPOConfig, check_batch, policy_loss, visual_focus, visual_weights
from vgpo_kernels.integrations.transformers import capture_hidden_states, visual_mask, visual_token_ids


class Prompt(NamedTuple):
    """An image, a question about it, and the right answer."""

    image: Image.Image
    question: str
    answer: str


def draw_prompts(number: int, seed: int) -> list[Prompt]:
    """Draw prompts of the task: the same seed gives the same ones."""
    return [Prompt(problem.image, PROMPT, problem.answer) for problem in make_problems(number, "train", seed)]


def reward(response: str, answer: str) -> float:
    """1 where the last number of a response is the answer, else 0."""
    return float(re.findall(r"\d+", response)[-1:] == [answer])


@dataclass
class Rollout:
    """Responses of one micro-batch: B of them, which are whole groups.

    Attributes:
        inputs: What the model's forward pass takes: ``input_ids`` and ``attention_mask`` ``[B, S]``, pixels, ...; a
            row is padding, a prompt and its response, which is the last T positions.
        response_mask: True at tokens that the policy sampled, ``[B, T]`` bool: the EOS is one, what follows it is not.
        group_ids: The same number for all responses to a prompt, ``[B]`` int64.
        rewards: ``[B]`` float32.
        advantages: ``[B]`` float32.
        old_logp: Log-probabilities of the response's tokens when they were sampled, ``[B, T]`` float32.
    """

    inputs: dict[str, Tensor]
    response_mask: Tensor
    group_ids: Tensor
    rewards: Tensor
    advantages: Tensor
    old_logp: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        """The response's tokens, ``[B, T]``."""
        return self.inputs["input_ids"][:, -self.response_mask.shape[1] :]


@torch.no_grad()
def sample(model: Any, processor: Any, prompts: Sequence[Prompt], settings: argparse.Namespace) -> Rollout:
    """Let the policy answer every prompt ``settings.generations`` times, and reward what it answers."""
    # The responses to a prompt stand next to each other, and form a group.
    repeated = [prompt for prompt in prompts for _ in range(settings.generations)]
    group_ids = torch.arange(len(prompts), device=model.device).repeat_interleave(settings.generations)
    asked = encode(processor, repeated).to(model.device)

    # What is sampled from must be what log-probs are computed of: the softmax of all logits over the temperature. So
    # everything else that a model's generation config may ask for is off. An image token without an image would stop
    # the next forward pass.
    sequences = model.generate(
        **asked,
        do_sample=True,
        temperature=settings.temperature,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=settings.max_new_tokens,
        suppress_tokens=list(visual_token_ids(model)),
    )
    length = sequences.shape[1] - asked["input_ids"].shape[1]
    tokens = sequences[:, -length:]

    # The policy chose to end, so the EOS is scored; generate fills up what follows it.
    ends = torch.isin(tokens, torch.tensor(model.generation_config.eos_token_id, device=tokens.device)).int()
    response_mask = ends.cumsum(1) - ends == 0

    # Images have been expanded to their tokens by the processor. What else it gives each token (token types) is 0 for
    # text.
    inputs = {
        name: pad(value, (0, length)) if value.shape == asked["input_ids"].shape else value
        for name, value in asked.items()
    }
    inputs["input_ids"] = sequences
    inputs["attention_mask"] = torch.cat([asked["attention_mask"], response_mask.to(asked["attention_mask"])], dim=1)
    if settings.skip_truncated:  # after the attention mask: a row in which nothing is attended has no softmax
        response_mask = response_mask & ends.any(1, keepdim=True)

    texts = processor.batch_decode(tokens, skip_special_tokens=True)
    rewards = torch.tensor(
        [reward(text, prompt.answer) for text, prompt in zip(texts, repeated, strict=True)], device=model.device
    )
    groups = rewards.view(len(prompts), settings.generations)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    return Rollout(inputs, response_mask, group_ids, rewards, advantages.flatten())


def encode(processor: Any, prompts: Sequence[Prompt]) -> Any:
    """Return what ``generate`` takes, padded on the left, so that every response begins at the same position."""
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image, question, _ in prompts
    ]
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def forward(model: Any, rollout: Rollout, settings: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the response's tokens ``[B, T]``, and the hidden states ``[B, S, D]``."""
    with capture_hidden_states(model) as captured:
        logits = model(**rollout.inputs, use_cache=False).logits
    length = rollout.response_mask.shape[1]
    # The logits before a token predict it.
    logits = logits[:, -length - 1 : -1].float() / settings.temperature
    logp = logits.log_softmax(-1).gather(-1, rollout.tokens[..., None]).squeeze(-1)
    return logp, captured.hidden


def log_probs(model: Any, rollout: Rollout, settings: argparse.Namespace) -> Tensor:
    """Return log-probabilities of the response's tokens, ``[B, T]``."""
    return forward(model, rollout, settings)[0]


def loss_of(
    model: Any, rollout: Rollout, num_tokens: Tensor, settings: argparse.Namespace, *, check: bool = False
) -> PolicyLoss:
    """Return the loss of a micro-batch as its share of the loss of the whole batch, which has ``num_tokens``."""
    logp, hidden = forward(model, rollout, settings)
    old_logp, advantages, response_mask = rollout.old_logp, rollout.advantages, rollout.response_mask
    images = visual_mask(rollout.inputs["input_ids"], model, response_mask)
    if check:
        check_batch(
            model,
            hidden,
            rollout.inputs["input_ids"],
            logp,
            old_logp,
            advantages,
            images,
            response_mask,
            rollout.group_ids,
            temperature=settings.temperature,
            raises=True,
        )

    cos = visual_focus(hidden, images, response_mask)
    weights = visual_weights(cos, response_mask, rollout.group_ids, VGPOConfig.paper())
    loss, metrics = policy_loss(
        logp, old_logp, advantages, response_mask, factors=weights.factors, num_tokens=num_tokens
    )
    return PolicyLoss(loss, metrics | weights.metrics)


class Objective(nn.Module):
    """The model and its loss in one module: DistributedDataParallel follows calls of what it wraps."""

    def __init__(self, model: nn.Module, loss: Callable[..., PolicyLoss]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, rollout: Rollout, *arguments: Any, **options: Any) -> PolicyLoss:
        """Return the loss of a micro-batch."""
        return self.loss(self.model, rollout, *arguments, **options)


def update(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    rollouts: Sequence[Rollout],
    settings: argparse.Namespace,
    *,
    check: bool = False,
) -> Tensor:
    """Take one optimizer step on micro-batches, of which every rank has its own.

    Returns loss, visual focus and the norm of the gradient, ``[3]``, the same on every rank.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    # A mean over the tokens of all micro-batches and ranks is a sum of shares, each over the number of them all.
    num_tokens = total(sum(rollout.response_mask.sum() for rollout in rollouts))
    measured = torch.zeros(2, device=num_tokens.device)
    for number, rollout in enumerate(rollouts, start=1):
        last = number == len(rollouts)
        with objective.no_sync() if ranks > 1 and not last else nullcontext():
            loss, metrics = objective(rollout, num_tokens, settings, check=check)
            # DistributedDataParallel takes the mean of the ranks' gradients, where the loss is the sum of shares.
            (loss * ranks).backward()
        measured += torch.stack([loss.detach(), metrics["focus_mean"] / (len(rollouts) * ranks)])
    norm = nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return torch.cat([total(measured), norm[None]])


def total(value: Tensor) -> Tensor:
    """Return the sum of a tensor over ranks."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def load(settings: argparse.Namespace) -> tuple[Any, Any]:
    """Return model and processor. The model stays in eval mode: ratios begin at 1, as there is no dropout."""
    dtype = getattr(torch, settings.dtype)
    model = AutoModelForImageTextToText.from_pretrained(settings.model, dtype=dtype).to(settings.device)
    processor = AutoProcessor.from_pretrained(settings.model)
    processor.tokenizer.padding_side = "left"
    return model, processor


def train(settings: argparse.Namespace, logp: Callable[..., Tensor], loss: Callable[..., PolicyLoss]) -> None:
    """Train a model; ``logp`` and ``loss`` are called as ``log_probs`` and ``loss_of`` are."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model, processor = load(settings)
    # Parameters that the loss does not reach (the last norm of LLaVA's vision tower) would be waited for.
    objective: Any = Objective(model, loss)
    if ranks > 1:
        objective = DistributedDataParallel(objective, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)

    for step in range(settings.steps):
        rollouts = []
        for part in range(settings.accumulation):
            # Micro-batches are numbered over ranks: each has prompts and random numbers of its own.
            seed = settings.seed + (step * ranks + rank) * settings.accumulation + part
            torch.manual_seed(seed)
            rollout = sample(model, processor, draw_prompts(settings.prompts, seed), settings)
            with torch.no_grad():
                rollout.old_logp = logp(model, rollout, settings)
            rollouts.append(rollout)
        mean_reward = total(torch.stack([rollout.rewards.mean() for rollout in rollouts]).mean() / ranks)

        for number in range(settings.updates):
            check = step == 0 and number == 0
            found = update(objective, optimizer, rollouts, settings, check=check)
        if rank == 0:
            numbers = "loss {:.4f}, focus {:.4f}, gradient {:.3f}".format(*found.tolist())
            print(f"step {step + 1}: reward {mean_reward:.3f}, {numbers}", flush=True)


@contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started, if it did; they part when nothing of the block needs them any more."""
    if "LOCAL_RANK" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def parse_arguments(description: str | None, **defaults: Any) -> argparse.Namespace:
    """Read the settings of a run from the command line; ``defaults`` take the place of those here."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHIPPED), help="id or path of a vision-language model")
    parser.add_argument("--dtype", default="float32", help="of weights and activations")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=5, help="rollout batches")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches a step, on each rank")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of a micro-batch")
    parser.add_argument("--generations", type=int, default=8, help="responses to a prompt")
    parser.add_argument("--updates", type=int, default=2, help="optimizer steps on each rollout batch")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--skip-truncated", action="store_true", help="score no response that has not ended")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(**defaults)
    return parser.parse_args()


if __name__ == "__main__":
    with processes():
        train(parse_arguments(__doc__), log_probs, loss_of)
