"""Log-probabilities and entropies of a model by ``linear_logprob``, where TRL's passes ask the model for them.

TRL gives a model's ``forward`` an argument ``fused_lm_head``, and with it a head of its own. :func:`fuse_heads` answers
the same call: from the decoder's last hidden states and the head's weight, only the scored positions, a chunk of
logits at a time. Inside ``forward``, wrappers for data parallelism, sharding and mixed precision keep working, and
what reads hidden states on the way keeps reading them.

Many models do more to their logits than multiplying hidden states by the head: they scale, cap, cut or mask them. What
``linear_logprob`` can do as well is looked for in the configuration (``logit_maps``), where names mean different
things in different models. So whatever is found there, and nothing at all, is proven on a few tokens at the start,
against the model's own logits. Where ours differ TRL's head is tried, and where that differs too all logits are
computed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from vgpo_kernels import linear_divergence, linear_logprob
from vgpo_kernels.integrations.transformers import final_norm, logit_maps, unwrap
from vgpo_trainer.sharded import filled_in_calls, with_head

T = TypeVar("T")

OURS, TRLS, ALL_LOGITS = "linear_logprob", "TRL's head", "all logits"
PROBE_TOKENS = 8
# Heads are probed with hidden states as they are, and so large that a cap on logits shows.
PROBE_SCALES = (1.0, 64.0)


@dataclass(frozen=True)
class ViewCall:
    """What ``model(..., labels=labels, fused_lm_head=True, view=ViewCall(...))`` is asked for beside log-probabilities.

    Wrappers for data parallelism and sharding hand it through as it is, the states in it with their graph.

    Attributes:
        length: How many of the last tokens are meant, T.
        other: The states that predict them in another view of the same tokens, ``[b, T, D]``. ``None``: the states of
            this view are wanted, and the head does not run.
        head: Whether log-probabilities and entropies are wanted too.
        gradient: Whether the divergence needs a gradient.
        detach: Whether none of it goes through the other view, neither to its states nor to the head that read them.
        measures: What is asked of both views beside the tokens' log-probabilities, as ``linear_divergence`` names it.
    """

    length: int
    other: Tensor | None = None
    head: bool = True
    gradient: bool = False
    detach: bool = False
    measures: tuple[str, ...] = ("kl",)

    def needs_divergence(self) -> bool:
        """Whether what is asked for takes both distributions together; entropies take one at a time."""
        return self.gradient or not {"entropy", "other_entropy"}.issuperset(self.measures)


@dataclass
class ViewOutput(FusedCausalLMOutput):
    """TRL's output of a head, and what a :class:`ViewCall` asks for; fp32 but the states, 0 where a label is -100.

    Attributes:
        states: The states that predict the last T tokens, ``[b, T, D]``: that of a token is the one before it.
        kl: KL(this view || the other) of the distribution that each of these tokens was drawn from, in nats,
            ``[b, T]``.
        view_logp: Log-probabilities of the tokens in this view, ``[b, T]``.
        other_logp: The same in the other view.
        js: Jensen-Shannon divergence of both distributions, in nats, ``[b, T]``.
        view_entropy: Entropy of this view's distributions, in nats, ``[b, T]``.
        other_entropy: The same in the other view.
    """

    states: Tensor | None = None
    kl: Tensor | None = None
    view_logp: Tensor | None = None
    other_logp: Tensor | None = None
    js: Tensor | None = None
    view_entropy: Tensor | None = None
    other_entropy: Tensor | None = None


def fuse_heads(
    models: Sequence[nn.Module | None],
    temperature: float,
    *,
    fp32: bool,
    fused: bool = True,
    norm: str | nn.Module | None = None,
) -> str:
    """Let models answer TRL's log-probability passes by a head that gives what their own logits do.

    Args:
        models: The policy, and others of its architecture; ``None`` is skipped. Wrapped or not, after TRL's trainer has
            given them its own head, which stays where it is right and ours is not.
        temperature: What logits are divided by.
        fp32: Compute the logits' products in fp32, outside autocast.
        fused: Try ours first; else TRL's.
        norm: The final norm or its name, for a model in which it is not found.

    Returns:
        Which head is used: ``OURS``, ``TRLS`` or ``ALL_LOGITS``.

    """
    present = [unwrap(model) for model in models if model is not None]
    policy: Any = present[0]
    mapping, why_not_linear = agreed(linear_head(policy, norm))

    def ours(model: PreTrainedModel) -> None:
        fuse_head(model, temperature, fp32, norm, mapping)

    reason = why_not_linear or agreed(why_wrong(policy, temperature, ours, norm)) if fused else ""
    if reason is None:
        for model in present:
            ours(model)
        return OURS
    reason_of_trl = agreed(why_wrong(policy, temperature, lambda model: None, norm))
    if reason_of_trl is None and why_not_linear and agreed(why_wrong(policy, temperature, ours, norm)) is None:
        # In 16 bits a small change of the logits hides in their rounding, and TRL's head may have missed it as well.
        reason_of_trl = why_not_linear
    if reason_of_trl is not None:
        for model in present:
            use_all_logits(model, temperature)
        told = f"{reason or reason_of_trl}; log-probabilities are computed from all logits"
        warnings.warn(f"fused_head: {told}", stacklevel=3)
        return ALL_LOGITS
    if fused:
        warnings.warn(f"fused_head: {reason}; TRL's own head computes the log-probabilities", stacklevel=3)
    return TRLS


def agreed(found: T) -> T:
    """Return what the first process found: others may not have the weights yet (FSDP loads them on one)."""
    everybody: list[T] = broadcast_object_list([found])
    return everybody[0]


class Mapping(NamedTuple):
    """What a model does to its logits: ``cap(logit_scale * product)``, the arguments of :func:`linear_logprob`."""

    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self, products: Tensor) -> Tensor:
        """Return the logits, fp32, of what the LM head gives."""
        scaled = products.float() * self.logit_scale
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap


NOTHING = Mapping()


def linear_head(model: PreTrainedModel, norm: str | nn.Module | None) -> tuple[Mapping, str | None]:
    """Return what a model does to the products of its hidden states and its LM head.

    Returns:
        The mapping, and ``None``; or the empty mapping, and why the model's logits are none of these.

    """
    name, head = type(model).__name__, model.get_output_embeddings()
    linear = getattr(head, "original_module", head)  # PEFT trains a copy of it
    if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
        why = f"the LM head of {name} is no linear layer of floating-point numbers but {type(linear).__name__}"
        return NOTHING, why
    left = [Mapping(*one) for one in logit_maps(model.config)]

    def multiply(weight: Tensor, bias: Tensor | None, hidden: Tensor) -> dict[str, Tensor]:
        return {"products": nn.functional.linear(hidden, weight.to(hidden.dtype), bias)}

    def compare(inputs: dict[str, Tensor]) -> str | None:
        logits = model(**inputs).logits
        hidden = last_hidden_states(model, model.forward, norm, **inputs, use_cache=False)
        products = with_head(head, multiply, hidden)["products"]
        left[:] = [one for one in left if agree(logits, products, one)]
        return None if left else f"{name} does more to its logits than its LM head and its configuration say"

    why_not = probed(model, norm, compare)
    return (NOTHING, why_not) if why_not is not None else (left[0], None)


def agree(logits: Tensor, products: Tensor, mapping: Mapping) -> bool:
    """Whether a model's logits are a mapping of its head's products, to the rounding of the model's dtype."""
    expected = mapping.logits(products)
    # Half a unit in the last place for each step: the product, a scale, and the three of a cap. Sums in another order.
    steps = 1 + (mapping.logit_scale != 1) + 3 * (mapping.softcap is not None)
    rounding = max((0.5 + steps) * torch.finfo(products.dtype).eps, 1e-5)
    allowed = expected.abs() * rounding + 1e-5 * float(expected.abs().max())
    return logits.shape == expected.shape and bool(((logits.float() - expected).abs() <= allowed).all())


def why_wrong(
    model: PreTrainedModel,
    temperature: float,
    install: Callable[[PreTrainedModel], None],
    norm: str | nn.Module | None,
) -> str | None:
    """Return why a head gives other log-probabilities than a model's own logits, or ``None`` if it gives the same.

    Args:
        model: The model, which is left as it was.
        temperature: What logits are divided by.
        install: Puts the head into the model's ``forward``.
        norm: The final norm or its name, for a model in which it is not found.

    """
    plain = model.forward

    def compare(inputs: dict[str, Tensor]) -> str | None:
        ids = inputs["input_ids"]
        logits = model(**inputs).logits[:, :-1].float() / temperature
        install(model)
        try:
            found = model(**inputs, labels=ids, fused_lm_head=True).log_probs
        finally:
            model.forward = plain
        error = float((found - logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]).abs().max())
        largest = float(logits[logits > torch.finfo(torch.float16).min].abs().max())
        if error <= 1e-4 + 2 * torch.finfo(model.dtype).eps * largest:
            return None
        return f"log-probabilities of {type(model).__name__} differ by {error:.1e} from those of its logits"

    return probed(model, norm, compare)


def probed(
    model: PreTrainedModel, norm: str | nn.Module | None, compare: Callable[[dict[str, Tensor]], str | None]
) -> str | None:
    """Return what a comparison on a few tokens finds, with hidden states as they are and large."""
    ids = probe_tokens(model)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        for scale in PROBE_SCALES:
            with filled_in_calls(model), evaluating(model), last_states_scaled(model, norm, scale), torch.no_grad():
                reason = compare(inputs)
            if reason is not None:
                return reason
    except Exception as error:  # whatever it is, this head is not proven
        told = f"{type(error).__name__}: {error}"
        return f"log-probabilities of {type(model).__name__} could not be compared with its own logits ({told})"
    return None


def probe_tokens(model: PreTrainedModel) -> Tensor:
    """A few ordinary tokens, ``[1, PROBE_TOKENS]``: none that a configuration gives a meaning."""
    configs = [model.config, *(value for value in vars(model.config).values() if isinstance(value, PreTrainedConfig))]
    settings = [(name, value) for config in configs for name, value in vars(config).items()]
    special = {value for name, value in settings if name.endswith(("_id", "_index")) and isinstance(value, int)}
    ordinary = [token for token in range(3, 3 + PROBE_TOKENS + len(special)) if token not in special]
    return torch.tensor([ordinary[:PROBE_TOKENS]], device=model.device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch a model to inference in the block, and each of its modules back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def last_states_scaled(model: PreTrainedModel, norm: str | nn.Module | None, factor: float) -> Iterator[None]:
    """Multiply what the final norm gives in the block."""
    hook = final_norm(model, norm).register_forward_hook(lambda module, inputs, output: output * factor)
    try:
        yield
    finally:
        hook.remove()


def fuse_head(
    model: PreTrainedModel,
    temperature: float,
    fp32: bool,
    norm: str | nn.Module | None = None,
    mapping: Mapping = NOTHING,
) -> None:
    """Replace what ``model(..., labels=labels, fused_lm_head=True)`` computes; every other call stays as it is."""

    def compute(
        self: PreTrainedModel,
        plain: Callable[..., Any],
        labels: Tensor,
        *arguments: Any,
        view: ViewCall | None = None,
        **named: Any,
    ) -> Any:
        if named.get("output_router_logits"):  # a router's loss comes with TRL's head
            return plain(*arguments, labels=labels, fused_lm_head=True, **named)
        last = last_hidden_states(self, plain, norm, *arguments, **named)
        if view is not None and view.other is None:
            # A copy, so that the states of the prompt are not kept.
            return ViewOutput(states=last[:, -view.length - 1 : -1].clone())
        other = () if view is None else (view.other,)

        def from_head(
            weight: Tensor, bias: Tensor | None, hidden: Tensor, other: Tensor | None = None
        ) -> dict[str, Tensor]:
            def to_head(states: Tensor) -> Tensor:
                states = states.to(weight.device, last.dtype)  # an output of a pass in mixed precision is fp32
                return states.float() if fp32 else states

            logits = {"bias": bias, "temperature": temperature, **mapping._asdict()}
            hidden, targets = to_head(hidden), labels[:, 1:].to(weight.device)
            found: dict[str, Tensor] = {}
            with torch.autocast(hidden.device.type, enabled=False) if fp32 else nullcontext():
                if view is None or view.head:
                    logp, entropy = linear_logprob(hidden, weight, targets, return_entropy=True, **logits)
                    found.update(log_probs=logp, entropy=entropy)
                if view is None:
                    return found
                states = (hidden[:, -view.length :], to_head(other))
                with nullcontext() if view.gradient else torch.no_grad():
                    return found | compared(view, *states, weight, targets[:, -view.length :], found, logits)

        # The head is looked up in each call: FSDP and PEFT replace its parameters.
        return ViewOutput(**with_head(self.get_output_embeddings(), from_head, last[:, :-1], *other))

    answer(model, compute)


def compared(
    view: ViewCall,
    hidden: Tensor,  # [b, T, D]
    other: Tensor,  # [b, T, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [b, T]
    known: dict[str, Tensor],
    logits: dict[str, Any],
) -> dict[str, Tensor]:
    """Return what a call asks of two views, by the names of a :class:`ViewOutput`.

    Args:
        view: The call.
        hidden: States of the view that passes.
        other: Those of the other.
        weight: The head's.
        targets: The tokens.
        known: Log-probabilities and entropies of this view, where they are computed anyway.
        logits: What else ``linear_logprob`` is told of the logits.
    """
    if view.needs_divergence():
        other_head: dict[str, Tensor | None] = {}
        if view.detach:
            bias = logits["bias"]
            other_head = {"other_weight": weight.detach(), "other_bias": None if bias is None else bias.detach()}
        both = linear_divergence(hidden, other, weight, targets, measures=view.measures, **other_head, **logits)
        names = {"logp": "view_logp", "entropy": "view_entropy"}
        return {names.get(name, name): value for name, value in both._asdict().items() if value is not None}
    if known:
        logp, entropy = (known[name][:, -view.length :].detach() for name in ("log_probs", "entropy"))
    else:
        logp, entropy = linear_logprob(hidden, weight, targets, return_entropy=True, **logits)
    other_logp, other_entropy = linear_logprob(other, weight, targets, return_entropy=True, **logits)
    return {"view_logp": logp, "other_logp": other_logp, "view_entropy": entropy, "other_entropy": other_entropy}


def last_hidden_states(
    model: PreTrainedModel, plain: Callable[..., Any], norm: str | nn.Module | None, *arguments: Any, **named: Any
) -> Tensor:
    """Return what the LM head would read, ``[B, S, D]``, with its gradient."""
    if model.base_model is not model:
        hidden: Tensor = model.base_model(*arguments, **named).last_hidden_state
        return hidden
    # Head and decoder are no two parts of such a model (Llama 4, BLIP-2): the head reads one position, which is least.
    seen: list[Tensor] = []
    hook = final_norm(model, norm).register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        plain(*arguments, **named, logits_to_keep=1)
    finally:
        hook.remove()
    return seen[-1]


def use_all_logits(model: PreTrainedModel, temperature: float) -> None:
    """Let ``model(..., labels=labels, fused_lm_head=True)`` read the model's own logits, all of them in memory."""

    def compute(self: PreTrainedModel, plain: Callable[..., Any], labels: Tensor, *arguments: Any, **named: Any) -> Any:
        output = plain(*arguments, **named)
        targets = labels[:, 1:].to(output.logits.device)
        scored = targets != -100
        log_probabilities = (output.logits[:, :-1][scored].float() / temperature).log_softmax(-1)
        zeros = log_probabilities.new_zeros(targets.shape)
        logp = log_probabilities.gather(-1, targets[scored][:, None])[:, 0]
        entropy = torch.special.entr(log_probabilities.exp()).sum(-1)
        return FusedCausalLMOutput(
            log_probs=zeros.masked_scatter(scored, logp),
            entropy=zeros.masked_scatter(scored, entropy),
            aux_loss=getattr(output, "aux_loss", None),
        )

    answer(model, compute)


def answer(model: PreTrainedModel, compute: Callable[..., Any]) -> None:
    """Let ``compute`` answer calls of a model with ``fused_lm_head=True``, and its ``forward`` all others as before.

    Args:
        model: The model.
        compute: Called with the model, its ``forward`` as it was, the labels, and the other arguments of the call.

    """
    plain = model.forward

    # generate() looks its arguments up in the signature.
    @wraps(type(model).forward)
    def forward(
        self: PreTrainedModel, *arguments: Any, fused_lm_head: bool = False, labels: Any = None, **named: Any
    ) -> Any:
        if fused_lm_head:
            return compute(self, plain, labels, *arguments, **{**named, "use_cache": False})
        return plain(*arguments, **named) if labels is None else plain(*arguments, labels=labels, **named)

    model.forward = MethodType(forward, model)
