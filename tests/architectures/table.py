"""docs/models.md: which architectures work with what, as the checks found."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from architectures.checks import CHECKS
from architectures.verdicts import Verdict
from architectures.zoo import NOT_APPLICABLE

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"

HEAD = """# Models

Every architecture that transformers maps to image-text-to-text, tried with a tiny random model of its own classes. The
table is written by `scripts/models_page.py` from the checks in `tests/architectures`, which are part of `make test`.
Tried with {versions}.

- **Hidden states**: what `capture_hidden_states` captures is bit for bit what the LM head reads, or a multiple of it,
  which has the same cosines.
- **Visual tokens**: `visual_mask` marks the positions where image features enter.
- **Attention shares**: `capture_attention_mass` gives the shares of the model's own attention weights, to 1e-4, in a
  pass and in every step of `generate`, with eager and SDPA; layers are named where only some have attention.
- **Log-probs**: the trainer's log-probabilities are those of the model's own logits; by `linear_logprob` without
  logits, scaled and capped as the configuration says, or by TRL's head or from all logits where the model does more to
  its logits.
- **LoRA**: `--lora-rank` reaches every linear layer of the decoder's layers, and nothing else. In some mixtures of
  experts PEFT adapts the experts in the place of shared ones.
- **Views**: `spoilt_view` changes images, the logits of the rows that have them, and nothing else: rows of text alone
  keep theirs bit for bit. A swap is the batch with its images exchanged; without images no token sees their places.
- **Blind pass**: under `blind_attention` text gives images no weight in any layer, and the answer's logits are those of
  an explicit mask, whatever the images; after it the model is as before. `reuse_vision_tower` runs the tower once.

Refused means: an error says what is quoted here, and there is no number.

"""
MIDDLE = """
## Not applicable

"""
FOOT = """
## A model that is not here

`VGPOTrainer(..., visual_tokens=(id, ...), final_norm="model.text.ln_out")` names what is not found, and
`capture_hidden_states` and `capture_attention_mass` take `norm=`. Whatever the model, log-probabilities are compared
with its own logits on a few tokens when a trainer starts, and the attention of a layer with its output when it is first
captured.
"""


def cell(verdict: Verdict) -> str:
    """What a verdict looks like in the table."""
    if verdict.outcome == "works":
        return f"yes: {verdict.note}" if verdict.note else "yes"
    return f"**refused**: {verdict.note}"


def page(rows: Mapping[str, Mapping[str, str]], versions: str) -> str:
    """Return the page.

    Args:
        rows: Cells by check, by architecture.
        versions: What they were tried with.

    """
    lines = ["| architecture | " + " | ".join(CHECKS) + " |", "|---" * (len(CHECKS) + 1) + "|"]
    lines += [f"| `{name}` | " + " | ".join(rows[name][check] for check in CHECKS) + " |" for name in sorted(rows)]
    reasons = [f"- `{name}`: {reason}" for name, reason in sorted(NOT_APPLICABLE.items())]
    parts = [HEAD.format(versions=versions), "\n".join(lines), "\n", MIDDLE, "\n".join(reasons), "\n", FOOT]
    return "".join(parts)


def recorded(text: str, name: str) -> dict[str, str]:
    """Return the cells of an architecture in the page; empty ones where it is missing."""
    row = re.search(rf"^\| `{re.escape(name)}` \| (.*) \|$", text, re.MULTILINE)
    cells = row.group(1).split(" | ") if row else [""] * len(CHECKS)
    return dict(zip(CHECKS, cells, strict=True))


def versions(text: str) -> str:
    """Return what the page says it was tried with."""
    found = re.search(r"^Tried with (.*)\.$", text, re.MULTILINE)
    return found.group(1) if found else ""
