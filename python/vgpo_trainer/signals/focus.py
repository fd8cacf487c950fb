"""Visual focus as visual signal, ``signal="focus"``: the cosine of a token's hidden state to the image's prototype."""

from __future__ import annotations

from torch import Tensor

from vgpo_kernels import visual_focus
from vgpo_trainer.signals.hidden_states import HiddenStateSignal


class FocusSignal(HiddenStateSignal):
    """The paper's signal: cosines, from which ``visual_weights`` makes focus scores."""

    def reduce(self, hidden: Tensor, image_mask: Tensor, response_mask: Tensor) -> Tensor:
        """Return cosines ``[b, T]`` to the prototype of the image tokens before each token, 0 off the mask."""
        return visual_focus(hidden, image_mask, response_mask, visibility="causal")
