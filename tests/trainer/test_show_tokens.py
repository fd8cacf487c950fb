"""show_tokens: what it takes, what it shows, and that nothing in a token is more than text."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from trainer.test_report import ATTACK, Page
from vgpo_trainer import show_tokens

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["The", " answer", "\n", "<eos>"]


class Words:
    """A tokenizer of four words."""

    def decode(self, ids: list[int]) -> str:
        (token,) = ids
        return TEXTS[token]


def tooltips(view) -> list[str]:
    return [value for name, value in Page(view._repr_html_()).attributes if name == "title"]


def backgrounds(view) -> list[tuple[str, float]]:
    """The hue and the opacity of each token that has a colour."""
    found = re.findall(r'style="background:rgba\(var\(--(up|down)\),([\d.]+)\)"', view._repr_html_())
    return [(hue, float(opacity)) for hue, opacity in found]


@pytest.mark.parametrize(
    "values",
    [
        [0.25, -0.5, math.nan, 1.0],
        [np.float32(0.25), torch.tensor(-0.5), None, 1],
        np.array([0.25, -0.5, np.nan, 1.0], dtype=np.float32),
        torch.tensor([0.25, -0.5, -math.inf, 1.0], dtype=torch.bfloat16, requires_grad=True),
    ],
    ids=["list", "mixed", "array", "tensor"],
)
def test_takes_the_numbers_of_any_loop(values):
    view = show_tokens(TEXTS, values)
    assert tooltips(view) == ["0.25, token 1", "-0.5, token 2", "no signal, token 3", "1, token 4"]
    assert repr(view) == "<TokenView: 4 tokens, -0.5 to 1 (1 without signal)>"
    # One colour from the smallest number to the largest, none where there is no number.
    assert backgrounds(view) == [("up", 0.3), ("down", 0.0), ("up", 0.6)]


def test_ids_are_decoded_one_by_one():
    for ids in ([0, 2], np.array([0, 2]), torch.tensor([0, 2])):
        view = show_tokens(ids, [1, 2], tokenizer=Words())
        assert view.tokens == ["The", "\n"] and tooltips(view) == ["1, token 1, id 0", "2, token 2, id 2"]


def test_a_center_has_a_colour_on_either_side():
    factors = [1.0, 1.5, 0.75, 2.0]
    assert backgrounds(show_tokens(TEXTS, factors, center=1.0)) == [
        ("down", 0.0),
        ("up", 0.3),
        ("down", 0.15),
        ("up", 0.6),
    ]
    cut = show_tokens(TEXTS, factors, center=1.0, limits=(0.5, 1.25))
    assert backgrounds(cut) == [("down", 0.0), ("up", 0.6), ("down", 0.3), ("up", 0.6)]
    assert "no colour: 1" in Page(cut._repr_html_()).text
    assert {opacity for _, opacity in backgrounds(show_tokens(TEXTS, [1, 1, 1, 1], center=1))} == {0.0}
    assert backgrounds(show_tokens(TEXTS, factors, limits=(1, 3)))[3] == ("up", 0.3)


def test_several_rows_have_scales_of_their_own():
    cos, factors = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.5, 1.0, 1.0, 1.5])
    view = show_tokens(TEXTS, {"focus": cos, "factor": factors}, center={"factor": 1.0}, limits={"focus": (0.0, 0.4)})
    assert repr(view) == "<TokenView: 4 tokens, focus 0.1 to 0.4; factor 0.5 to 1.5>"
    assert [hue for hue, _ in backgrounds(view)] == ["up"] * 4 + ["down", "down", "down", "up"]
    assert tooltips(view)[4] == "factor 0.5, token 1"
    for rows in ([cos, factors], torch.stack([cos, factors]), [cos.tolist(), factors.numpy()]):
        assert [row.name for row in show_tokens(TEXTS, rows).rows] == ["row 1", "row 2"]


def test_nothing_to_show_is_shown():
    assert repr(show_tokens([], [])) == "<TokenView: 0 tokens, no signal>"
    Page(show_tokens([], torch.zeros(0))._repr_html_())
    assert repr(show_tokens(["a"], [math.inf])) == "<TokenView: 1 token, no signal>"


def test_white_space_is_visible_and_still_text():
    page = Page(show_tokens(["\n", "\t", " ", "", "\r", "a b"], [0.0] * 6)._repr_html_())
    assert page.text.endswith(
        "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n\N{RIGHTWARDS ARROW TO BAR}\t ∅\N{REPLACEMENT CHARACTER}a b\n\n"
    )
    assert page.tags.count("i") == 2


def test_a_token_is_text_whatever_it_holds(tmp_path):
    view = show_tokens([ATTACK], {ATTACK: [1.0]}, title=ATTACK)
    path = view.save(tmp_path / "tokens.html")
    saved = path.read_text(encoding="utf-8")
    for text in (view._repr_html_(), saved):
        page = Page(text)
        assert "script" not in page.tags and "img" not in page.tags
        assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
        assert page.text.count(ATTACK) >= 3 and "url(" not in text and "@import" not in text
    assert view._repr_html_() in saved and "default-src 'none'" in saved


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"values": [1, 2, 3]}, ValueError, r"values must have one number for each of the 4 tokens, got 3"),
        ({"values": {"ψ": [1]}}, ValueError, r"the row 'ψ' of values must have one number .* 4 tokens, got 1"),
        ({"values": torch.zeros(1, 1, 4)}, ValueError, r"must be \[T\], one number a token, got \[1, 4\]"),
        ({"values": 3.0}, TypeError, "values must be a list, an array or a tensor of numbers, got float"),
        ({"values": "1234"}, TypeError, "values must be a list, an array or a tensor of numbers, got str"),
        ({"values": [1, 2, "3", 4]}, TypeError, "must be numbers, got '3'"),
        ({"tokens": "text"}, TypeError, "tokens must be a list with the text of each token, got one string"),
        ({"tokens": ["a", 1, "b", "c"]}, TypeError, "tokens must be all texts or all ids, got 'a'"),
        ({"tokens": [0, 1, 2, 3]}, TypeError, "pass the tokenizer"),
        ({"tokens": torch.zeros(1, 4)}, ValueError, r"tokens must be \[T\], the ids of one response, got \[1, 4\]"),
        ({"tokens": [0, -100, 2, 3], "tokenizer": Words()}, ValueError, "the id -100 at position 1"),
        ({"center": math.nan}, ValueError, "center must be finite"),
        ({"limits": (1, 1)}, ValueError, "limits must be two finite numbers, the smaller one first"),
        ({"limits": (0, 1), "center": 1}, ValueError, "center must lie between limits"),
        ({"center": {"ψ": 0}}, ValueError, "center names the row 'ψ', but values has rows without names"),
        ({"values": {"φ": [0] * 4}, "limits": {"ψ": (0, 1)}}, ValueError, "limits names the row 'ψ', but .* 'φ'"),
    ],
)
def test_what_cannot_be_shown_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        show_tokens(**{"tokens": TEXTS, "values": [0.0] * 4, **arguments})


def test_it_needs_none_of_the_trainers_packages():
    program = """
import sys
sys.modules.update(dict.fromkeys(("PIL", "rich", "trl", "transformers", "datasets", "sklearn", "scipy", "tokenizers")))
from vgpo_trainer import show_tokens
print(show_tokens(["a"], [1.0]))
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "<TokenView: 1 token, 1 to 1>\n", result.stderr
