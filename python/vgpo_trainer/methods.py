"""The methods that the trainer has: all of :data:`vgpo_kernels.integrations.methods.METHODS`."""

from __future__ import annotations

from typing import Any

from vgpo_kernels.integrations.methods import METHODS, Method, compares_responses, find_method

__all__ = ["ELSEWHERE", "METHODS", "Method", "compares_responses", "known_method"]

# Methods that people may ask for, and why they are not here.
ELSEWHERE = {
    "cgpo": "it spoils the regions that a response names, which takes responses that name some, and a reward that "
    "detects them: make that view yourself, and hand its k3 to shape_tokens with ShapingConfig.cgpo()",
    "va_opd": "it distils a teacher, which this trainer does not have: hand the teacher's log-ratios to shape_tokens "
    "with ShapingConfig.va_opd()",
    "at_rl": "its formula was not published in full (arXiv 2602.11455): signal='attention' is the share of attention "
    "that it starts from",
    "dyco_rl": "it reads attention while it generates, and no formula for tokens was published: signal='attention' is "
    "the share of attention that it starts from",
}
# What people call the run without a method, and losses, which go beside one.
_PLAIN = ("none", "baseline", "grpo", "dr_grpo", "bnpo", "dapo", "gspo", "cispo", "sapo")


def known_method(name: Any) -> Method:
    """Return a method by its name.

    Raises:
        TypeError: The name is no text.
        ValueError: There is none of this name here.
    """
    if isinstance(name, str) and name.lower() in _PLAIN:
        raise ValueError(
            f"method={name!r} is no weighting: a run without one has vgpo=None (--vgpo none), and its loss is loss_type"
        )
    return find_method(name, METHODS, ELSEWHERE, "this trainer")
