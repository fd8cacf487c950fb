"""Log-probabilities and entropies of a model by ``linear_logprob``, where TRL's passes ask the model for them.

TRL gives a model's ``forward`` an argument ``fused_lm_head``, and with it a head of its own. :func:`fuse_heads` answers
the same call: from the decoder's last hidden states and the head's weight, only the scored positions, a chunk of
logits at a time. Inside ``forward``, wrappers for data parallelism, sharding and mixed precision keep working, and
what reads hidden states on the way keeps reading them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.utils import FusedCausalLMOutput

from vgpo_kernels import linear_logprob
from vgpo_kernels.integrations.transformers import unwrap

# What models do to their logits beside multiplying, by the name of the setting; the same names as TRL's head reads.
TRANSFORMATIONS = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
)


def fuse_heads(models: Sequence[nn.Module | None], temperature: float, *, fp32: bool) -> None:
    """Let models answer TRL's log-probability passes by ``linear_logprob``, if it computes what their heads do.

    Args:
        models: The policy, and others of its architecture; ``None`` is skipped. Wrapped or not, after TRL's trainer has
            given them its own head, which stays where ours does not fit.
        temperature: What logits are divided by.
        fp32: Compute the logits' products in fp32, outside autocast.

    """
    present = [unwrap(model) for model in models if model is not None]
    reason = next(filter(None, map(why_not, present)), None)
    if reason is not None:
        warnings.warn(f"fused_head: {reason}; TRL's own head computes the log-probabilities", stacklevel=3)
        return
    for model in present:
        fuse_head(model, temperature, fp32)


def why_not(model: PreTrainedModel) -> str | None:
    """Return why a model's log-probabilities are not those of a linear head, or ``None`` if they are."""
    name, config = type(model).__name__, model.config.get_text_config()
    for setting in TRANSFORMATIONS:
        if getattr(config, setting, None) not in (None, 1, 1.0):
            return f"{name} transforms its logits ({setting}={getattr(config, setting)})"
    if is_deepspeed_zero3_enabled():
        return "DeepSpeed's ZeRO-3 has taken the head's weight away by the time its gradient is computed"
    head = model.get_output_embeddings()
    head = getattr(head, "original_module", head)  # PEFT trains a copy of it
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        return f"the LM head of {name} is no linear layer of floating-point numbers but {type(head).__name__}"
    return None


def fuse_head(model: PreTrainedModel, temperature: float, fp32: bool) -> None:
    """Replace what ``model(..., labels=labels, fused_lm_head=True)`` computes; every other call stays as it is."""
    plain = model.forward

    # generate() looks its arguments up in the signature.
    @wraps(type(model).forward)
    def forward(
        self: PreTrainedModel, *arguments: Any, fused_lm_head: bool = False, labels: Any = None, **named: Any
    ) -> Any:
        if not fused_lm_head or named.get("output_router_logits"):  # a router's loss comes with TRL's head
            named |= {"fused_lm_head": True} if fused_lm_head else {}
            return plain(*arguments, **named) if labels is None else plain(*arguments, labels=labels, **named)
        output = self.base_model(*arguments, **{**named, "use_cache": False})
        # The head is looked up in each call: FSDP and PEFT replace its parameters.
        head: Any = self.get_output_embeddings()
        weight, bias = whole(head.weight), whole(head.bias)
        assert weight is not None
        hidden = output.last_hidden_state[:, :-1].to(weight.device)
        autocast: AbstractContextManager[Any] = nullcontext()
        if fp32:
            hidden, autocast = hidden.float(), torch.autocast(hidden.device.type, enabled=False)
        with autocast:
            logp, entropy = linear_logprob(
                hidden,
                weight,
                labels[:, 1:].to(weight.device),
                bias=bias,
                temperature=temperature,
                return_entropy=True,
            )
        return FusedCausalLMOutput(log_probs=logp, entropy=entropy)

    model.forward = MethodType(forward, model)


def whole(parameter: Tensor | None) -> Tensor | None:
    """Gather a parameter that FSDP has left sharded."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
