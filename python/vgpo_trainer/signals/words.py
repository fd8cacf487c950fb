"""What visual signals are called where people read them: progress lines, model cards, reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SignalWords:
    """The words for a signal's numbers.

    Attributes:
        name: Of the signal.
        word: The same where there is little room.
        unit: What the number of one token is; the label of an axis.
        short: The same in a word, before the number of a token.
        explanation: What it is, in a sentence or two.
        percent: Whether it is a share, written as a percentage.
    """

    name: str
    word: str
    unit: str
    short: str
    explanation: str
    percent: bool = False


WORDS = {
    "focus": SignalWords(
        "visual focus",
        "focus",
        "cosine to the image",
        "cosine",
        "Cosine between the last hidden state of a token and the mean over the image tokens before it. It shows how "
        "strongly the model still represents the image while it writes.",
    ),
    "attention": SignalWords(
        "attention on the image",
        "attention",
        "share of attention",
        "attention",
        "Share of a token's attention that goes to image tokens, averaged over heads and the layers read.",
        percent=True,
    ),
    "dependency": SignalWords(
        "dependency on the image",
        "dependency",
        "divergence in nats",
        "divergence",
        "Divergence of a token's distribution from that under a spoilt view of the image: 0 where the token would "
        "have been the same without the image.",
    ),
    "similarity": SignalWords(
        "similarity to the image",
        "similarity",
        "mean cosine to the image",
        "cosine",
        "Mean cosine between the hidden state of a token and those of the image tokens before it, over all layers.",
    ),
    "k3": SignalWords(
        "dependency on the image",
        "k3",
        "k3 of the sampled token",
        "k3",
        "How far the log-probability of the sampled token is from that under a spoilt view of the image, as k3: 0 "
        "where both are equal, at most 10.",
    ),
    "logp_change": SignalWords(
        "dependency on the image",
        "log-ratio",
        "log-ratio in nats",
        "log-ratio",
        "Absolute change of the sampled token's log-probability under a spoilt view of the image.",
    ),
    "js": SignalWords(
        "dependency on the image",
        "JS",
        "divergence in nats",
        "divergence",
        "Jensen-Shannon divergence of a token's distribution and that under a spoilt view of the image: 0 where both "
        "are equal, at most 0.69.",
    ),
}


def words_of(signal: str) -> SignalWords:
    """Return the words for a signal; one of your own is called by its name in the table of signals."""
    return WORDS.get(signal) or SignalWords(signal, signal, signal, signal, f"The signal {signal!r} of each token.")
