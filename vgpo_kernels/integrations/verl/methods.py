"""Methods by name: what each reads of a token, under which view of its images, and which runs are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vgpo_kernels import ShapingConfig, VGPOConfig
from vgpo_kernels.integrations import methods
from vgpo_kernels.integrations.methods import Method, find_method
from vgpo_kernels.integrations.surface import config_from

# What each signal is, in words, and which signals of shape_tokens its passes give.
SIGNALS = {
    "focus": ("visual focus", ("visual",)),
    "similarity": ("mean cosine to the image's tokens over all layers", ("visual", "entropy")),
    "k3": ("k3 of the sampled token", ("visual", "entropy")),
    "logp_change": ("change of the sampled token's log-prob", ("visual", "entropy")),
    "js": ("Jensen-Shannon divergence", ("visual", "entropy", "gap")),
}
VIEWS = {
    "mask": "patches of the image masked",
    "noise": "noise in the image",
    "none": "image tokens taken out",
    "blind": "attention to the image masked",
}


METHODS = {name: method for name, method in methods.METHODS.items() if method.weighs}


def describe(method: Method) -> str:
    """Return what a method reads, in words."""
    signal = SIGNALS[method.signal or "focus"][0]
    if method.view is None:
        return signal
    share = "" if method.strength is None else f" ({method.strength:g})"
    return f"{signal}, {VIEWS[method.view]}{share}"


# Methods that people may ask for, and why they are not here.
ELSEWHERE = {
    "papo": "its term of the loss has a gradient through a pass that verl's loss does not see: `vgpo train --method "
    "papo` has it, and policy_loss(views=...) in a loop of your own",
    "cgpo": "it spoils the regions that each response names, and its reward detects them: make that view yourself and "
    "hand its k3 to shape_tokens with ShapingConfig.cgpo(), or take method=vppo, which masks patches",
    "va_opd": "it distils a teacher: hand the teacher's log-ratios to shape_tokens with ShapingConfig.va_opd()",
    "at_rl": "its formula was not published in full: take method=vgpo or method=pgpo, which reads attention to images",
    "dyco_rl": "its formula for tokens was not published: take method=vgpo or method=pgpo",
}


def method_from(settings: Any) -> tuple[str, VGPOConfig | ShapingConfig]:
    """Return the method that ``algorithm.vgpo`` names, and its settings.

    Args:
        settings: A mapping: ``method`` (``"vgpo"`` unless given), and fields of its settings. VGPO's are those of
            :func:`~vgpo_kernels.integrations.surface.config_from`, with ``preset``; of others those of
            :class:`ShapingConfig`.

    Raises:
        TypeError: ``settings`` is no mapping, or a value has the wrong type.
        ValueError: The method or a field is unknown, or a value is out of range.

    """
    if not isinstance(settings, Mapping):
        raise TypeError(f"settings must be a mapping, got {type(settings).__name__}")
    given = dict(settings.items())
    name = given.pop("method", "vgpo")
    method = find_method(name, METHODS, ELSEWHERE, "verl")
    if name == "vgpo":
        return name, config_from(given)
    if "preset" in given:
        raise ValueError(
            f"preset is of method=vgpo, which has two; leave algorithm.vgpo.preset out beside method={name}, whose "
            "settings are the published ones"
        )
    unknown = set(given) - set(ShapingConfig.__dataclass_fields__)
    if unknown:
        raise ValueError(
            f"unknown settings of method={name}: {', '.join(sorted(unknown))}; they are fields of ShapingConfig"
        )
    config = ShapingConfig.preset(name, **given)
    assert isinstance(config, ShapingConfig)
    gives = SIGNALS[method.signal or "focus"][1]
    missing = [signal for signal in config.needs() if signal not in gives]
    if missing:
        raise ValueError(f"method={name} reads {' and '.join(gives)} of a token, and these settings need {missing[0]}")
    return name, config


def refusals(config: Any, name: str) -> list[str]:
    """Return why verl's configuration does not go with a method, a reason each.

    Args:
        config: verl's, of any trainer.
        name: The method.

    """
    if name == "vgpo":
        return []
    method, part = METHODS[name], config.actor_rollout_ref
    actor, reasons = part.actor, []
    if actor.strategy == "megatron":
        reasons.append("strategy=megatron, whose pipeline makes one pass of a micro-batch: take method=vgpo or FSDP")
        return reasons
    ranks = max(actor.get("ulysses_sequence_parallel_size", 1), _of_engine(actor, "ulysses_sequence_parallel_size"))
    if ranks > 1 and method.signal in ("similarity", "js"):
        reasons.append(f"ulysses_sequence_parallel_size={ranks}, which splits the hidden states that it reads")
    if ranks > 1 and method.view == "blind":
        reasons.append(f"ulysses_sequence_parallel_size={ranks}, which needs flash attention, where no image is hidden")
    if method.signal == "js" and part.model.get("use_fused_kernels", False):
        reasons.append("model.use_fused_kernels=true, which passes by the head that both views are compared in")
    if method.over_selected:
        mode, loss_mode = actor.loss_agg_mode, actor.policy_loss.get("loss_mode", "vanilla")
        if mode != "token-mean":
            reasons.append(f"loss_agg_mode={mode}: its loss is the mean over selected tokens, which is token-mean here")
        if loss_mode in BY_RESPONSE:
            reasons.append(f"loss_mode={loss_mode}, which averages by response, and its loss over selected tokens")
    return reasons


# Losses that average by response whatever loss_agg_mode says, or compare responses alone.
BY_RESPONSE = ("gspo", "sapo", "geo_mean", "vgpo_gspo", "vgpo_sapo")


def _of_engine(actor: Any, name: str) -> int:
    engine = actor.get("fsdp_config", None) or {}
    return int(engine.get(name, 1) or 1)
