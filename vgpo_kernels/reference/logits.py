"""How an LM head's products become logits: scaled, capped and divided by a temperature."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LogitMap(NamedTuple):
    """What a model and a sampler do to ``hidden @ weight.T + bias``.

    Attributes:
        temperature: What logits are divided by.
        temperatures: Another one for each row, fp32 ``[N]``, on top of ``temperature``; ``None``: none.
        logit_scale: What the products are multiplied by, before they are capped.
        softcap: c of ``c tanh(x / c)``; 0: no cap.

    """

    temperature: float = 1.0
    temperatures: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float = 0.0

    def logits(self, products: Tensor, bias: Tensor | None) -> Tensor:
        """Return the logits of products ``[N, V]``, computed in their dtype."""
        scaled = (products if bias is None else products + bias.to(products.dtype)) * self.logit_scale
        if self.softcap:
            scaled = torch.tanh(scaled / self.softcap) * self.softcap
        scaled = scaled / self.temperature
        return scaled if self.temperatures is None else scaled / self.temperatures.to(products.dtype)[:, None]
