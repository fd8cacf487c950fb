"""What a release is made of: one version, an sdist and a wheel that hold what they must, and the forms of the forge."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from load_script import load_script
from vgpo_trainer.cli import build_parser
from vgpo_trainer.runs.folder import version_of

import vgpo_kernels

ROOT = Path(__file__).resolve().parents[2]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))

yaml = pytest.importorskip("yaml")
dist = load_script("dist")


def test_the_version_is_the_same_everywhere() -> None:
    version = vgpo_kernels.__version__
    assert version == dist.version() == version_of("vgpo-kernels")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["Unreleased", f"{version} - {citation['date-released']}"]
    assert str(citation["version"]) == version
    banner = re.search(r"vgpo_kernels (\d\S*),", (ROOT / "docs" / "verl.md").read_text())
    assert banner is not None and banner.group(1) == version


@pytest.fixture(scope="module")
def of_the_sdist(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names that setuptools would put into an sdist; nothing is written beside the sources."""
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"VGPO_BUILD": "none"}
    subprocess.run(command, cwd=ROOT, env=variables, check=True, capture_output=True)
    (info,) = folder.glob("*.egg-info")
    return (info / "SOURCES.txt").read_text().splitlines()


def test_an_sdist_holds_what_a_build_the_tests_and_people_need(of_the_sdist: list[str]) -> None:
    assert dist.missing_of_sdist(of_the_sdist) == set()
    assert not [name for name in of_the_sdist if name.endswith((".so", ".pyc")) or name.startswith("build/")]


def test_what_an_sdist_or_a_wheel_lacks_is_found(of_the_sdist: list[str]) -> None:
    needed = {"csrc/library.cpp", "setup.py", "python/vgpo_trainer/demo/assets/digits-warm-start/model.safetensors"}
    assert dist.missing_of_sdist(set(of_the_sdist) - needed) == needed
    everything = {name.removeprefix("python/") for name in of_the_sdist}
    assert dist.missing_of_wheel(everything) == set()
    needed = {"vgpo_kernels/py.typed", "vgpo_trainer/reports/assets/tokens.css"}
    assert dist.missing_of_wheel(everything - needed) == needed


def test_make_dist_is_the_script() -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    shown = subprocess.run(["make", "-n", "dist"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(r"python scripts/dist\.py --torch 'torch==[\d.]+'$", shown, re.MULTILINE)
    assert "`make dist`" in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_a_form_asks_for_what_exists(form: Path) -> None:
    content = yaml.safe_load(form.read_text())
    if form.stem == "config":
        assert content == {"blank_issues_enabled": True}
        return
    assert content["name"] and content["description"]
    names = [field["id"] for field in content["body"]]
    assert len(set(names)) == len(names) and all(field["attributes"]["label"] for field in content["body"])
    for command in re.findall(r"`vgpo ([a-z]+)", form.read_text()):
        with pytest.raises(SystemExit, match="0"):
            build_parser().parse_args([command, "--help"])
    for page in re.findall(r"docs/[\w-]+\.md", form.read_text()):
        assert (ROOT / page).is_file()


def test_the_forms_are_there() -> None:
    assert {form.stem for form in FORMS} == {"bug", "config", "feature", "wrong_numbers"}
    assert (ROOT / ".github" / "pull_request_template.md").is_file()
