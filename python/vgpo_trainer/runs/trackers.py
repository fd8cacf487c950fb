"""Trackers of experiments (``report_to``): the packages that they need, and what they cannot take."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from vgpo_trainer.rollouts import prompt_text

PACKAGES = {"comet_ml": "comet-ml", "azure_ml": "azureml-mlflow"}  # those that are not called as the tracker is


def check_trackers(report_to: str | Sequence[str]) -> None:
    """Refuse a tracker whose package is not installed.

    Args:
        report_to: Of the training arguments.

    Raises:
        ValueError: Saying what to install.
    """
    available = get_available_reporting_integrations()
    for name in [report_to] if isinstance(report_to, str) else report_to:
        if name in INTEGRATION_TO_CALLBACK and name not in available:
            raise ValueError(
                f"report_to={name} needs a package that is not installed: pip install {PACKAGES.get(name, name)}"
            )


def tell_in_words(table: dict[str, Any]) -> None:
    """Turn the conversations in TRL's table of completions into text.

    A table of Weights & Biases has columns of one type, and ends a run where messages have several kinds of
    parts, as every prompt with an image has.
    """
    for name in ("prompt", "completion"):
        table[name] = deque(map(prompt_text, table[name]), maxlen=table[name].maxlen)
