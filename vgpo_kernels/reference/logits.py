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

    def of_rows(self, rows: slice | Tensor | None) -> LogitMap:
        """Return the map of some rows, a slice of them or their indices; ``None``: of all."""
        if self.temperatures is None or rows is None:
            return self
        return self._replace(temperatures=self.temperatures[rows])

    def logits(self, products: Tensor, bias: Tensor | None) -> Tensor:
        """Return the logits of products ``[N, V]``, computed in their dtype."""
        scaled = self._scaled(products, bias)
        if self.softcap:
            scaled = torch.tanh(scaled / self.softcap) * self.softcap
        scaled = scaled / self.temperature
        return scaled if self.temperatures is None else scaled / self.temperatures.to(products.dtype)[:, None]

    def slope_of_cap(self, products: Tensor, bias: Tensor | None) -> Tensor | float:
        """Return what the cap multiplies a gradient w.r.t. the logits by, ``[N, V]``: 1 - tanh^2; 1 without a cap."""
        if not self.softcap:
            return 1.0
        return 1 - torch.tanh(self._scaled(products, bias) / self.softcap).square()

    def divisor(self) -> float | Tensor:
        """Return what a gradient w.r.t. logits is divided by, beside the cap's slope: a number, or fp32 ``[N]``."""
        divisor = self.temperature / self.logit_scale
        return divisor if self.temperatures is None else self.temperatures * divisor

    def _scaled(self, products: Tensor, bias: Tensor | None) -> Tensor:
        return (products if bias is None else products + bias.to(products.dtype)) * self.logit_scale
