"""Every architecture that transformers maps to image-text-to-text, by a tiny model: what works, and what is refused.

docs/models.md is the table of these results; scripts/models_page.py writes it.
"""

from __future__ import annotations

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")
pytest.importorskip("peft")

from architectures import table  # noqa: E402
from architectures.checks import CHECKS  # noqa: E402
from architectures.zoo import ARCHITECTURES, NOT_APPLICABLE, example  # noqa: E402

# Of another mapping, and trained on images all the same.
ALSO = {"phi4_multimodal"}
PAGE = table.PAGE.read_text()


def test_every_architecture_has_a_tiny_model_or_a_reason() -> None:
    mapped = set(transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    assert not mapped - set(ARCHITECTURES) - set(NOT_APPLICABLE), "new: add a tiny model to tests/architectures"
    assert not set(ARCHITECTURES) & set(NOT_APPLICABLE)
    assert set(ARCHITECTURES) | set(NOT_APPLICABLE) <= mapped | ALSO


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name: str, check: str) -> None:
    verdict = CHECKS[check](example(name))
    assert table.cell(verdict) == table.recorded(PAGE, name)[check], "run scripts/models_page.py"


def test_the_page_lists_what_was_tested() -> None:
    assert table.page({name: table.recorded(PAGE, name) for name in ARCHITECTURES}, table.versions(PAGE)) == PAGE
