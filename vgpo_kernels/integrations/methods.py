"""Methods by name: what each reads of a token, under which view of its images, and what of that enters the loss.

A method is a line of :data:`METHODS`, which the trainer and the adapter to verl share. How its signals become weights
is the preset of the same name (:class:`vgpo_kernels.ShapingConfig`); docs/methods.md says where this differs from
papers and from released code.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vgpo_kernels.config import VGPOConfig
from vgpo_kernels.shaping import ShapingConfig

# Bounds that VPPO and PAPO take from verl: of the log-ratio, and of the value.
LOG_RATIO_LIMIT, K3_LIMIT = 20.0, 10.0


@dataclass(frozen=True)
class Method:
    """A published method.

    Attributes:
        title: Its short name, as people write it.
        paper: Title of its paper.
        arxiv: Number of its paper.
        signal: Its visual signal: ``"similarity"``, the mean cosine to the image's tokens over all layers; ``"k3"`` of
            the sampled token between two views; ``"logp_change"``, the change of its log-prob; ``"js"``, the
            Jensen-Shannon divergence of both distributions; ``None``: any, by default the focus.
        view: How images are spoilt for it, if they are: a kind of
            :func:`vgpo_kernels.integrations.transformers.spoilt_view`, or ``"blind"``: no token attends to them.
        strength: Of that view; ``None``: the kind's own.
        view_of: Whether each ``"response"`` has a view of its own, or each ``"prompt"``, whose responses share it.
        weighs: Whether tokens or responses are weighed. PAPO weighs nothing: it adds the term ``view_coef``.
        over_selected: Whether the loss is the mean over the selected tokens, not over all.
        view_coef: Weight of PAPO's term, likewise the next two (settings of the trainer).
        view_estimator: Of the term.
        view_detach: Of the term.
    """

    title: str
    paper: str
    arxiv: str
    signal: str | None = None
    view: str | None = None
    strength: float | None = None
    view_of: str = "response"
    weighs: bool = True
    over_selected: bool = False
    view_coef: float = 0.0
    view_estimator: str = "exact"
    view_detach: bool = False

    @property
    def address(self) -> str:
        """Where its paper is."""
        return f"https://arxiv.org/abs/{self.arxiv}"


# Strengths: VPPO blackens half of the patches, PAPO 60 %. Noise of standard deviation 2 on pixels of deviation 1, as
# VEPO adds it, is 4 / 5 of the variance.
METHODS = {
    "vgpo": Method("VGPO", "Visually-Guided Policy Optimization", "2604.09349"),
    "pepo": Method("PEPO", "Rethinking Token-Level Policy Optimization for Multimodal CoT", "2603.22847", "similarity"),
    "vppo": Method("VPPO", "Spotlight on Token Perception for Multimodal RL", "2510.09285", "k3", "mask", 0.5),
    "pgpo": Method("PGPO", "Not All Tokens See Equally", "2604.01840", "k3", "blind"),
    "tor": Method(
        "ToR",
        "Bridging Perception and Reasoning: Token Reweighting for RLVR in MLLMs",
        "2603.25077",
        "logp_change",
        "none",
    ),
    "vepo": Method(
        "VEPO", "Entropy Is Not Enough", "2606.03937", "js", "noise", 0.8, view_of="prompt", over_selected=True
    ),
    "papo": Method(
        "PAPO",
        "Perception-Aware Policy Optimization for Multimodal Reasoning",
        "2507.06448",
        view="mask",
        strength=0.6,
        view_of="prompt",
        weighs=False,
        view_coef=0.01,
        view_estimator="k3",
        view_detach=True,
    ),
}


def find_method(name: Any, known: Mapping[str, Method], elsewhere: Mapping[str, str], place: str) -> Method:
    """Return a method by its name.

    Args:
        name: Any value.
        known: The methods that there are.
        elsewhere: Those that people may ask for, and why they are not there.
        place: Where these are not, in words.

    Raises:
        TypeError: The name is no text.
        ValueError: There is none of this name.

    """
    if not isinstance(name, str):
        raise TypeError(f"method must be a name, one of {', '.join(known)}, got {type(name).__name__}")
    if name in known:
        return known[name]
    plain = name.lower().replace("-", "_").replace(" ", "_")
    if plain in elsewhere:
        raise ValueError(f"method={name!r} is not in {place}: {elsewhere[plain]}; here are {', '.join(known)}")
    close = difflib.get_close_matches(plain, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"method must be one of {', '.join(known)}, got {name!r}{hint}")


def compares_responses(config: VGPOConfig | ShapingConfig) -> bool:
    """Whether a response's factors depend on other responses, so that they need a whole batch.

    Args:
        config: The settings of the factors.

    """
    if isinstance(config, VGPOConfig):
        return config.inter or (config.score == "offset" and config.score_offset is None)
    selects = config.top_visual is not None or config.top_entropy is not None
    return config.response != "none" or (selects and config.scope != "response")


def k3(logp: Tensor, other: Tensor) -> Tensor:
    """Estimate KL(policy || policy in the other view) from sampled tokens: ``exp(d) - d - 1`` of the log-ratio d.

    Args:
        logp: Log-probs (natural logarithm) of the tokens with the images as they are, ``[...]``.
        other: The same in the other view, in logp's shape.

    Returns:
        From 0 to 10, in logp's shape; log-ratios are bounded by +-20. NaN stays.

    """
    ratio = (other - logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return (ratio.exp() - ratio - 1).clamp(0.0, K3_LIMIT)
