r"""VGPO in verl (0.9): one line of configuration, with every trainer of verl.

::

    python -m verl.trainer.main_ppo ... +algorithm.vgpo.preset=paper    # and any field of VGPOConfig
    python -m verl.trainer.main_ppo ... +algorithm.vgpo.method=vppo     # or pepo, pgpo, tor, vepo, and of ShapingConfig

verl imports this package by itself where it is installed (the entry point ``verl.plugins``), or where
``VERL_USE_EXTERNAL_MODULES=vgpo_kernels.integrations.verl`` says so. With ``algorithm.vgpo`` in the configuration

- the workers compute the visual focus of what was sampled in the old-log-prob pass (a hook on the final norm, no extra
  forward pass): one more value per token beside the log-prob and the entropy, ``visual_focus`` in the engine's model
  output. Where verl makes no such pass (``rollout_correction.bypass_mode``), one of the decoder alone is made;
- the driver, which has the whole rollout batch and knows the groups by uid, multiplies the advantages by the factors.

Other methods read other signals, some in the same pass, some of one more with spoilt images (``methods.py``).

``loss_mode`` ``vgpo`` (PPO with dual clip, as ``vanilla``), ``vgpo_gspo``, ``vgpo_cispo`` and ``vgpo_sapo`` are this
library's losses. The re-weighted advantages work with verl's own losses as well.

Importing this package imports nothing of verl: modules of verl are changed when they are imported (``plugin.py``).
"""

from vgpo_kernels.integrations.verl.fsdp import score_focus
from vgpo_kernels.integrations.verl.losses import compute_policy_loss, expect_reweighted_advantages
from vgpo_kernels.integrations.verl.plugin import attach
from vgpo_kernels.integrations.verl.scoring import focus_of_packed

__all__ = ["attach", "compute_policy_loss", "expect_reweighted_advantages", "focus_of_packed", "score_focus"]

attach()
