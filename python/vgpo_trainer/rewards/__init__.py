"""Rewards: the default one for questions with one right answer, and reward functions named on the command line."""

from __future__ import annotations

from vgpo_trainer.rewards.answers import completion_text, exact_answer, extract_answer, normalise_answer
from vgpo_trainer.rewards.loading import load_reward, load_rewards, needs_answer

__all__ = [
    "completion_text",
    "exact_answer",
    "extract_answer",
    "load_reward",
    "load_rewards",
    "needs_answer",
    "normalise_answer",
]
