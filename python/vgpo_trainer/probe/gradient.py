"""How far a step along a weighted policy gradient goes along the policy gradient itself.

The gradient of a batch with its plain advantages is an unbiased estimate of the policy gradient, if a noisy one.
Weights are worth their bias where they take noise away: then the weighted gradient of a batch points closer to the
plain gradient of batches that it shares no prompt with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vgpo_kernels import VGPOConfig, linear_logprob
from vgpo_kernels.integrations.transformers import decoder_of
from vgpo_trainer.probe.measuring import DEPENDENCY, Head, Key, Measured, last_states, read_head
from vgpo_trainer.probe.record import Gradient, GradientFinding
from vgpo_trainer.probe.sampling import ProbeError, RolloutBatch
from vgpo_trainer.probe.statistics import Array, Resampling, shuffled_within
from vgpo_trainer.probe.weights import weights_of

LARGEST = 1 << 30  # numbers that are kept at a time: 4 GB
EVERYTHING, LAST_LAYER = "all of the decoder", "the last layer of the decoder"
FEWEST = 3  # batches


def gradient_efficiency(
    model: Any,
    batches: Sequence[RolloutBatch],
    measured: Measured,
    config: VGPOConfig,
    *,
    temperature: float,
    replicates: int,
    seed: int,
) -> Gradient:
    """Compare weightings of the advantages by the gradients that they give.

    The gradients are those of the whole decoder where these fit into 4 GB, one for each batch and weighting, else of
    its last layer.

    Args:
        model: The model.
        batches: Its responses, with rewards.
        measured: Of these batches.
        config: The settings of psi and phi.
        temperature: That the responses were sampled with.
        replicates: Of the bootstrap, which draws batches.
        seed: Of the bootstrap and of shuffles.

    Raises:
        ProbeError: There are no rewards, too few batches have rewards that differ, or the last layer is too large.
    """
    if measured.rewards is None:
        raise ProbeError("--gradient compares gradients of rewards, and these responses have none")
    advantages = group_advantages(measured.rewards, measured.groups)
    begins = np.cumsum([0, *(len(batch.groups) for batch in batches)])
    parts = list(zip(batches, begins[:-1].tolist(), begins[1:].tolist(), strict=True))
    parts = [part for part in parts if advantages[part[1] : part[2]].any()]
    if len(parts) < FEWEST:
        raise ProbeError(
            f"rewards differ within a prompt in {len(parts)} of {len(batches)} batches, and gradients are compared "
            f"over {FEWEST} at least: probe more prompts, or more responses each"
        )
    weightings = all_weightings(measured, config, np.random.default_rng([seed, 2]))
    name, parameters = chosen_parameters(model, (len(weightings) + 1) * len(parts))
    gradients = torch.zeros(len(weightings), len(parts), sum(parameter.numel() for parameter in parameters))
    head = read_head(model)
    with only_gradients_of(model, parameters):
        for number, (batch, begin, end) in enumerate(parts):
            logp = _logp(model, head, batch, temperature)
            length = logp.shape[1]
            for index, weights in enumerate(weightings.values()):
                weighed = advantages[begin:end, None] * weights[begin:end, :length] * measured.mask[begin:end, :length]
                total = (logp * weighed.to(logp.device)).sum() / measured.mask[begin:end].sum()
                found = torch.autograd.grad(total, parameters, retain_graph=True, materialize_grads=True)
                gradients[index, number] = torch.cat([part.reshape(-1).float().cpu() for part in found])
    plain = gradients[0]
    gram = (plain @ plain.T).double().numpy()
    resampling = Resampling(np.arange(len(parts)), replicates, seed)
    cosines = {}
    for weighting, weighted in zip(weightings, gradients, strict=True):
        products, norms = (weighted @ plain.T).double().numpy(), weighted.double().norm(dim=1).numpy()
        cosines[weighting] = resampling.values(
            lambda counts, products=products, norms=norms: cosine_to_others(products, norms, gram, counts)
        )
    return Gradient(
        parameters=name,
        batches=len(parts),
        findings=[
            GradientFinding(
                weighting,
                cosine=resampling.interval(cosines[weighting]),
                change=resampling.interval(cosines[weighting] - cosines["none"]),
                efficiency=float(cosines[weighting][0] / cosines["none"][0]),
            )
            for weighting in weightings
        ],
    )


def group_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """Return rewards less their group's mean over its standard deviation, as TRL computes them, ``[B]``.

    A reward that is NaN has advantage 0 and takes no part.
    """
    advantages = torch.zeros_like(rewards)
    for name in groups.unique().tolist():
        members = (groups == name) & rewards.isfinite()
        if int(members.sum()) > 1:
            of_group = rewards[members]
            advantages[members] = (of_group - of_group.mean()) / (of_group.std() + 1e-4)
    return advantages


def all_weightings(measured: Measured, config: VGPOConfig, rng: np.random.Generator) -> dict[str, Tensor]:
    """Return what advantages are multiplied by, ``[B, T]`` each, by name; the first is ones."""
    focus = Key("focus", "token")
    rows = measured.mask.nonzero()[:, 0].numpy()
    psi = weights_of(measured, focus, config).psi
    phi = weights_of(measured, focus, replace(config, inter=True)).phi
    by_mean = weights_of(measured, focus, replace(config, inter=True, accumulation="mean")).phi
    moved = torch.zeros_like(psi)
    moved[measured.mask] = psi[measured.mask][torch.from_numpy(shuffled_within(rows, rng))]
    exchanged = phi[torch.from_numpy(shuffled_within(measured.groups.numpy(), rng))]

    def of_tokens(key: Key) -> Tensor:
        return 1 + weights_of(measured, key, config).psi

    def of_responses(values: Tensor) -> Tensor:
        return (1 + values)[:, None].expand(psi.shape)

    return {
        "none": torch.ones_like(psi),
        "psi of focus at the token": 1 + psi,
        "psi of focus at the token, shuffled": 1 + moved,
        "psi of focus at the state": of_tokens(Key("focus", "state")),
        "psi of attention at the token": of_tokens(Key("attention", "token")),
        "psi of the dependency": of_tokens(DEPENDENCY),
        f"phi of focus at the token, {config.accumulation}": of_responses(phi),
        "phi of focus at the token, shuffled": of_responses(exchanged),
        "phi of focus at the token, mean": of_responses(by_mean),
        "psi and phi of focus at the token": (1 + psi) * of_responses(phi),
    }


def chosen_parameters(model: Any, copies: int) -> tuple[str, list[nn.Parameter]]:
    """Return parameters whose gradients fit into memory ``copies`` times: of the whole decoder, or of its last layer.

    Raises:
        ProbeError: Neither fits.
    """
    _, decoder = decoder_of(model)
    layers = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    last = max(layers, key=len)[-1] if layers else decoder
    for name, module in ((EVERYTHING, decoder), (LAST_LAYER, last)):
        parameters = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
        size = sum(parameter.numel() for parameter in parameters)
        if size * copies <= LARGEST:
            return name, parameters
    raise ProbeError(
        f"--gradient keeps {copies} gradients, and even the last layer of this model has {size:,} parameters: "
        "probe fewer prompts, or a smaller model"
    )


@contextmanager
def only_gradients_of(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let only these parameters need a gradient in the block."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)


def _logp(model: Any, head: Head, batch: RolloutBatch, temperature: float) -> Tensor:
    """Log-probabilities of a batch's response tokens, with their gradient, ``[B, T]``."""
    length = batch.response_mask.shape[1]
    ids = batch.inputs["input_ids"]
    states = last_states(model, batch.inputs)[:, -length - 1 : -1]
    mask = batch.response_mask.bool().to(ids.device)
    targets = ids[:, -length:].masked_fill(~mask, -100)
    return linear_logprob(states, targets=targets, **head.options(temperature))  # type: ignore[return-value]


def cosine_to_others(products: Array, norms: Array, gram: Array, counts: Array) -> Array:
    """Mean cosine of a batch's weighted gradient with the sum of the other batches' plain gradients, ``[R]``.

    Args:
        products: Of weighted gradients (rows) and plain ones (columns), ``[M, M]``.
        norms: Of the weighted gradients, ``[M]``.
        gram: Products of the plain gradients, ``[M, M]``.
        counts: How often each batch was drawn, ``[R, M]``; all copies of a batch are left out of its others.
    """
    along = counts @ products.T - counts * np.diag(products)
    with_sum = counts @ gram
    square = (counts * with_sum).sum(axis=1, keepdims=True) - 2 * counts * with_sum + counts**2 * np.diag(gram)
    lengths = norms * np.sqrt(np.maximum(square, 0))
    cosine = np.divide(along, lengths, out=np.zeros_like(along), where=lengths > 0)
    mean: Array = (counts * cosine).sum(axis=1) / counts.sum(axis=1)
    return mean
