"""The loop of ``grpo_own_loop.py`` without logits: the loss and all its gradients from hidden states and the LM head.

::

    python examples/linear_own_loop.py
    torchrun --nproc-per-node 2 examples/linear_own_loop.py --accumulation 1

The logits of a micro-batch are ``[tokens, V]``: 10 GB in fp32 for 16,000 tokens and the vocabulary of Qwen2.5-VL, and
as much again for their gradient. Here they are never stored. Sampling, rewards, groups, accumulation and ranks are
those of ``grpo_own_loop.py``, and so are the numbers that are printed.
"""

from __future__ import annotations

import argparse
from typing import Any

from grpo_own_loop import Rollout, parse_arguments, processes, train
from torch import Tensor

from vgpo_kernels import PolicyLoss, VGPOConfig, check_batch, linear_logprob, linear_vgpo_loss
from vgpo_kernels.integrations.transformers import visual_mask


def hidden_states(model: Any, rollout: Rollout) -> Tensor:
    """Return the hidden states that the LM head reads, ``[B, S, D]``, with their graph: the head itself is not run."""
    return model.model(**rollout.inputs, use_cache=False).last_hidden_state


def log_probs(model: Any, rollout: Rollout, settings: argparse.Namespace) -> Tensor:
    """Return log-probabilities of the response's tokens, ``[B, T]``."""
    head, length = model.get_output_embeddings(), rollout.response_mask.shape[1]
    # The row before a token predicts it.
    rows = hidden_states(model, rollout)[:, -length - 1 : -1]
    return linear_logprob(rows, head.weight, rollout.tokens, bias=head.bias, temperature=settings.temperature)


def loss_of(
    model: Any, rollout: Rollout, num_tokens: Tensor, settings: argparse.Namespace, *, check: bool = False
) -> PolicyLoss:
    """Return the loss of a micro-batch as its share of the loss of the whole batch, which has ``num_tokens``."""
    hidden = hidden_states(model, rollout)
    head = model.get_output_embeddings()
    images = visual_mask(rollout.inputs["input_ids"], model, rollout.response_mask)
    if check:
        check_batch(
            head,
            hidden,
            rollout.inputs["input_ids"],
            None,
            rollout.old_logp,
            rollout.advantages,
            images,
            rollout.response_mask,
            rollout.group_ids,
            temperature=settings.temperature,
            raises=True,
        )

    return linear_vgpo_loss(
        hidden,
        head.weight,
        rollout.tokens,
        rollout.old_logp,
        rollout.advantages,
        images,
        rollout.response_mask,
        rollout.group_ids,
        VGPOConfig.paper(),
        bias=head.bias,
        temperature=settings.temperature,
        num_tokens=num_tokens,
    )


if __name__ == "__main__":
    with processes():
        train(parse_arguments(__doc__), log_probs, loss_of)
