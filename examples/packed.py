"""A batch without padding: all sequences behind one another, and where each begins (``cu_seqlens``).

::

    python examples/packed.py

One batch of rollouts passes the model twice, padded as ``generate`` left it, and packed into one row. Loss, focus and
the gradient of every parameter are the same.

A model of transformers keeps the sequences of a row apart if it is given positions that begin anew, no attention mask
and **no cache**. With ``use_cache=True``, the default, they attend to one another, and nothing says so.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from grpo_own_loop import Rollout, draw_prompts, load, log_probs, loss_of, parse_arguments, sample
from torch import Tensor
from torch.nn.functional import pad

from vgpo_kernels import PolicyLoss, VGPOConfig, check_batch, vgpo_loss
from vgpo_kernels.integrations.transformers import capture_hidden_states, visual_mask


@dataclass
class Packed:
    """The N tokens of a rollout that are not padding.

    Attributes:
        inputs: What the model's forward pass takes; ``input_ids`` ``[1, N]``, and positions, which begin anew at each
            sequence: that is how the attention of transformers tells sequences apart where there is no attention mask.
        cu_seqlens: Where sequences begin and the last one ends, ``[B + 1]`` int32.
        response_mask: True at tokens that the policy sampled, ``[N]``.
        old_logp: Log-probability of each token when it was sampled, ``[N]``; 0 in prompts.
    """

    inputs: dict[str, Tensor]
    cu_seqlens: Tensor
    response_mask: Tensor
    old_logp: Tensor


def pack(model: Any, rollout: Rollout) -> Packed:
    """Leave the padding out of a rollout."""
    inputs = dict(rollout.inputs)
    kept = inputs["attention_mask"].bool()
    positions = positions_of(model, inputs)[:, kept][:, None]  # [1 or 4, 1, N]
    del inputs["attention_mask"]
    inputs = {name: value[kept][None] if value.shape == kept.shape else value for name, value in inputs.items()}
    inputs["position_ids"] = positions[0] if len(positions) == 1 else positions

    # What the response has for its T positions, the packed batch has for all tokens.
    prompt = (kept.shape[1] - rollout.response_mask.shape[1], 0)
    return Packed(
        inputs,
        pad(kept.sum(1).cumsum(0), (1, 0)).int(),
        pad(rollout.response_mask, prompt)[kept],
        pad(rollout.old_logp, prompt)[kept],
    )


def positions_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the position of every token in its sequence, ``[1, B, S]``; of Qwen's models also those in images."""
    text = (inputs["attention_mask"].cumsum(1) - 1)[None]
    if not hasattr(model.model, "get_rope_index"):
        return text
    return torch.cat([text, model.model.get_rope_index(**inputs)[0]])


def packed_loss(
    model: Any, rollout: Rollout, packed: Packed, num_tokens: Tensor, settings: argparse.Namespace
) -> PolicyLoss:
    """Return the loss of a packed rollout; advantages and group ids are per sequence, as in a padded one."""
    with capture_hidden_states(model) as captured:
        logits = model(**packed.inputs, use_cache=False).logits[0]
    hidden, ids = captured.hidden[0], packed.inputs["input_ids"][0]
    # The logits before a token predict it. The first token of a sequence is no response, so its value is not read.
    logp = (logits[:-1].float() / settings.temperature).log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
    logp = pad(logp, (1, 0))
    images = visual_mask(ids, model, packed.response_mask)
    batch = (rollout.advantages, images, packed.response_mask, rollout.group_ids)
    check_batch(
        model,
        hidden,
        ids,
        logp,
        packed.old_logp,
        *batch,
        cu_seqlens=packed.cu_seqlens,
        temperature=settings.temperature,
        raises=True,
    )
    return vgpo_loss(
        hidden,
        logp,
        packed.old_logp,
        *batch,
        VGPOConfig.paper(),
        cu_seqlens=packed.cu_seqlens,
        num_tokens=num_tokens,
    )


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradient of every parameter that the loss reaches, by its name."""
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def main(settings: argparse.Namespace) -> None:
    """Compare a padded batch with a packed one."""
    torch.manual_seed(settings.seed)
    model, processor = load(settings)
    rollout = sample(model, processor, draw_prompts(settings.prompts, settings.seed), settings)
    with torch.no_grad():
        rollout.old_logp = log_probs(model, rollout, settings)
    num_tokens = rollout.response_mask.sum()
    packed = pack(model, rollout)
    padded = rollout.inputs["input_ids"]
    print(f"padded: {padded.numel()} positions, {padded.shape[0]} sequences of {padded.shape[1]}")
    print(f"packed: {packed.response_mask.numel()} positions")

    expected, metrics = loss_of(model, rollout, num_tokens, settings, check=True)
    expected_gradients = gradients(model, expected)
    loss, packed_metrics = packed_loss(model, rollout, packed, num_tokens, settings)
    found = gradients(model, loss)

    print(f"loss:   padded {expected:.6f}, packed {loss:.6f}")
    print(f"focus:  padded {metrics['focus_mean']:.6f}, packed {packed_metrics['focus_mean']:.6f}")
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(packed_metrics["focus_mean"], metrics["focus_mean"], atol=1e-5, rtol=1e-4)
    assert found.keys() == expected_gradients.keys()
    largest = max(gradient.abs().max() for gradient in expected_gradients.values())
    apart = max((found[name] - gradient).abs().max() for name, gradient in expected_gradients.items())
    print(f"gradients of {len(found)} parameters: at most {apart / largest:.1e} of the largest apart")
    assert apart <= 1e-4 * largest


if __name__ == "__main__":
    main(parse_arguments(__doc__, prompts=4))
