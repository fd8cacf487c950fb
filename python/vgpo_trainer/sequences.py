"""Inputs of a pass over a prompt and the answer to it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pad


def extended_inputs(inputs: Any, sequence: Tensor) -> dict[str, Any]:
    """Return the inputs of a pass over the whole sequence: what stands by each token grows with it."""
    begin = inputs["input_ids"].shape
    extended = dict(inputs)
    for name, value in inputs.items():
        if getattr(value, "shape", None) == begin:
            extended[name] = pad(value, (0, sequence.shape[1] - begin[1]), value=int(name == "attention_mask"))
    return extended | {"input_ids": sequence}
