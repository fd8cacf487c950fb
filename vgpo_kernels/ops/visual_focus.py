"""Visual prototypes, and the visual focus of response tokens on them."""

from __future__ import annotations

import torch
from torch import Tensor

from vgpo_kernels import checks
from vgpo_kernels.config import Pooling, Visibility
from vgpo_kernels.hints import explained
from vgpo_kernels.ops import registry
from vgpo_kernels.reference import visual_focus as reference


@explained
def visual_prototype(
    hidden: Tensor,
    visual_mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    visibility: Visibility = "all",
    pooling: Pooling = "mean",
) -> Tensor:
    """Mean hidden state of each response's image (or video) tokens, the prototype mu (paper, Eq. 3).

    Args:
        hidden: Last-layer hidden states after the final norm, ``[B, S, D]`` padded or ``[N, D]`` packed;
            float32, bfloat16 or float16. Detached: no gradient flows into the signal.
        visual_mask: True at image tokens, bool or 0 and 1, ``[B, S]`` or ``[N]``. Any number of spans.
        cu_seqlens: Boundaries of a packed batch, int32 or int64 ``[B + 1]``.
        visibility: ``"all"``: the mean over all image tokens of the response. ``"causal"``: at each position the mean
            over those before it.
        pooling: ``"mean"``, or ``"unit_mean"``: the mean of the states' unit vectors ``v / max(|v|, 1e-8)``; NaN where
            one is not finite or the square of its norm leaves the range of float32.

    Returns:
        Prototypes ``[B, D]``, float32; zeros for a response without visual tokens. With ``"causal"`` one for each
        position, in ``hidden``'s shape; zeros before the first visual token. :func:`visual_focus` takes either as
        ``prototype``, with the same ``pooling``.

    Raises:
        TypeError: An argument is not a tensor or has the wrong dtype.
        ValueError: Shapes, devices or boundaries do not fit together, or ``visibility`` or ``pooling`` is unknown.

    """
    hidden, boundaries = checks.hidden_states(hidden, cu_seqlens)
    visible = checks.visual_mask(visual_mask, hidden)
    dtype = checks.compute_dtype(hidden)
    means = registry.call(
        "visual_prototype",
        hidden.device,
        dtype,
        hidden=hidden,
        visual_mask=visible,
        cu_seqlens=boundaries,
        causal=checks.visibility(visibility),
        unit=checks.pooling(pooling),
    )
    return means.to(dtype)  # type: ignore[no-any-return]


@explained
def visual_focus(
    hidden: Tensor,
    visual_mask: Tensor | None,
    response_mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    prototype: Tensor | None = None,
    prototype_index: Tensor | None = None,
    visibility: Visibility = "all",
    pooling: Pooling = "mean",
) -> Tensor:
    """Cosine similarity of each response token's hidden state with its image's prototype (paper, Eq. 4).

    ``cos = <h, mu> / max(|h| |mu|, 1e-8)``, where h is the hidden state at the token itself.

    With ``pooling="unit_mean"`` it is the mean over the image tokens of the cosine with each of them (PEPO's
    visual similarity, of one layer), at the price of one cosine: it is ``<h, m> / max(|h|, 1e-8)``, where m is the mean
    of the image tokens' unit vectors. An image token of zeros counts as a cosine of 0.

    A token that sees no image has no focus: its cosine is NaN, which :func:`visual_weights` reads as unweighted. Where
    an image is seen but the hidden state or the prototype is not finite, or the square of its norm leaves the range of
    float32 (float64 for float64 inputs), it is infinite, so that the two are told apart.

    Args:
        hidden: Last-layer hidden states after the final norm, ``[B, S, D]`` padded or ``[N, D]`` packed;
            float32, bfloat16 or float16. Detached. Rows off both masks are never read.
        visual_mask: True at image tokens, bool or 0 and 1, ``[B, S]`` or ``[N]``; may be ``None`` where
            ``prototype`` is given. Placeholders that the policy sampled into its answer are no image: leave them out.
        response_mask: True at scored response tokens, bool or 0 and 1: ``[B, T]`` with T <= S for the last T
            positions, or ``[N]``. May have holes.
        cu_seqlens: Boundaries of a packed batch, int32 or int64 ``[B + 1]``.
        prototype: Prototypes to use instead of the mean over ``visual_mask``: ``[P, D]``, or one for each position in
            ``hidden``'s shape. The responses to one prompt have the same image, so one row per prompt is enough. A row
            of zeros means no image.
        prototype_index: Row of ``prototype [P, D]`` for each response, integer ``[B]``, or for each token, in
            ``response_mask``'s shape; -1 for no image. Without it, ``prototype`` has one row per response. (``[B]`` and
            ``[N]`` are the same shape in a packed batch with N = B: then rows are per response.)
        visibility: Which image tokens a response token is compared with. ``"all"``: all of its response.
            ``"causal"``: those at positions before it; an image that arrives late (shown by a tool, in a later turn)
            then changes no bit of what came before. Where every image precedes the response, both give the same bits.
            Given prototypes are taken as they are.
        pooling: ``"mean"``: the cosine with the prototype. ``"unit_mean"``: the mean of the cosines with the image
            tokens; ``prototype`` is then :func:`visual_prototype`'s with ``pooling="unit_mean"``.

    Returns:
        Cosines, or means of them, in ``response_mask``'s shape, float32; 0 off the mask, NaN at tokens that see no
        image, infinite where a hidden state is not finite or a norm is out of range.

    Raises:
        TypeError: An argument is not a tensor or has the wrong dtype.
        ValueError: Shapes, devices, boundaries or indices do not fit together, or ``visibility`` or ``pooling`` is
            unknown.

    """
    hidden, boundaries = checks.hidden_states(hidden, cu_seqlens)
    mask, _ = checks.response_layout(response_mask, boundaries, hidden.device)
    checks.response_rows(mask, hidden)
    image = checks.image(visual_mask, prototype, prototype_index, visibility, hidden, mask, boundaries)
    dtype = checks.compute_dtype(hidden, image["prototype"])
    cos = registry.call(
        "visual_focus",
        hidden.device,
        dtype,
        hidden=hidden,
        response_mask=mask,
        cu_seqlens=boundaries,
        unit=checks.pooling(pooling),
        **image,
    )
    return cos.to(dtype)  # type: ignore[no-any-return]


def _fake_prototype(hidden: Tensor, cu_seqlens: Tensor | None, causal: bool) -> Tensor:
    if causal:
        return hidden.new_empty(hidden.shape, dtype=torch.float32)
    batch = hidden.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return hidden.new_empty((batch, hidden.shape[-1]), dtype=torch.float32)


def _fake_focus(hidden: Tensor, response_mask: Tensor) -> Tensor:
    return hidden.new_empty(response_mask.shape, dtype=torch.float32)


registry.define(
    reference.visual_prototype,
    "(Tensor hidden, Tensor visual_mask, Tensor? cu_seqlens, bool causal, bool unit) -> Tensor",
    _fake_prototype,
)
registry.define(
    reference.visual_focus,
    "(Tensor hidden, Tensor? visual_mask, Tensor response_mask, Tensor? cu_seqlens, Tensor? prototype, "
    "Tensor? prototype_index, bool causal, bool unit) -> Tensor",
    _fake_focus,
)
