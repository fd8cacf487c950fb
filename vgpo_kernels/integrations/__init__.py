"""Thin adapters to the codebases people train in. Each is imported by name, and imports its framework only then.

``vgpo_kernels.integrations.transformers``
    Last hidden states and visual tokens of a model as transformers builds it.
"""
