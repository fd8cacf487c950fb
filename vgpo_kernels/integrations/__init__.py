"""Thin adapters to the codebases people train in. Each is imported by name, and imports its framework only then.

``vgpo_kernels.integrations.transformers``
    Last hidden states, attention shares, visual tokens and second views of a model as transformers builds it.
``vgpo_kernels.integrations.verl``
    Focus scores, re-weighted advantages and losses in verl.
``vgpo_kernels.integrations.easyr1``
    The same in EasyR1 and in forks of it, as the VGPO authors'.

The trainer on TRL is a package of its own, ``vgpo_trainer``.
"""
