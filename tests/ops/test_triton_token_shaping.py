"""token_shaping in Triton where a response, a group or the batch takes several blocks of a kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cases import Response, make_batch
from test_token_shaping import CONFIGS, check, draw

from vgpo_kernels import ShapingConfig, backends

tl = pytest.importorskip("triton.language")

from vgpo_kernels.triton_kernels import response_scores, selections, token_shaping  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not backends.triton_interpreted(), reason="compiled kernels keep the blocks they were made of"),
    pytest.mark.parametrize("backend_name", ["triton"], indirect=True),
    pytest.mark.usefixtures("backend_name", "small_blocks"),
]

# Responses of several blocks, with holes and of one token; groups that alternate, and one of a single response.
RESPONSES = (
    *(Response(visual=0, length=length, group=index % 2, holes=index % 3 == 0) for index, length in enumerate((19, 4))),
    *(Response(visual=0, length=length, group=index % 2) for index, length in enumerate((9, 1, 12))),
    Response(visual=0, length=10, group=7),
)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(token_shaping, "RESPONSE_BLOCK", 8)
    monkeypatch.setattr(token_shaping, "TOKEN_BLOCK", 4)
    monkeypatch.setattr(response_scores, "SCORES", tl.constexpr(4))
    for module in (selections, token_shaping):
        monkeypatch.setattr(module, "RESPONSES", tl.constexpr(2))
    yield


@pytest.mark.parametrize(
    ("name", "packed"),
    [("cgpo", True), ("group scope", False), ("pepo", True), ("pgpo", False), ("va_opd", False), ("vppo", True)],
)
def test_blocks_of_any_size_match_the_definition(name: str, packed: bool) -> None:
    batch = make_batch(RESPONSES, features=1, packed=packed)
    check(batch, draw(batch, levels=3), CONFIGS[name])


def test_a_soft_or_of_nothing_is_nothing() -> None:
    """0 to the power of 0 is 1: with all weight on one signal, the other's largest values change no score."""
    batch = make_batch(RESPONSES[:2], features=1)
    for weight in (0.0, 1.0):
        check(batch, draw(batch, levels=3), ShapingConfig(top_visual=0.3, fusion="soft_or", fusion_weight=weight))
