"""Nothing that a model, a checkpoint or a file brings along is run, and pages show what they say as text."""

from __future__ import annotations

import ast
import json
import pickle
import re
import shutil
from pathlib import Path

import jinja2
import pytest
import torch

pytest.importorskip("trl")

from safetensors.torch import load_file
from trainer.test_report import Page
from trainer.tiny_runs import picture, save_model, save_rows
from vgpo_trainer import cli
from vgpo_trainer.demo import ablation as demo_ablation
from vgpo_trainer.reports import pages
from vgpo_trainer.runs.checkpoints import CheckpointError, check_checkpoint, checkpoints

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
ATTACK = '"><img src=x onerror=alert(2)><planted>'  # without a slash, so that it can be the name of a folder
FORBIDDEN = ("os.system", "os.popen", "eval", "exec", "pickle.load", "pickle.loads", "marshal.loads", "yaml.load")
SOURCES = [
    path
    for part in ("vgpo_kernels", "python", "scripts", "benchmarks", "setup.py")
    for path in ([ROOT / part] if (ROOT / part).is_file() else sorted((ROOT / part).rglob("*.py")))
]


class Planted:
    """Unpickled, it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return save_rows(tmp_path_factory.mktemp("data"), 4, "Add.")


@pytest.fixture
def command(dataset):
    def build(model: Path, out: Path, *more: object) -> list[str]:
        given = ["train", "--model", model, "--dataset", dataset, "--out", out, "--batch-size", 4, "--generations", 4]
        given += [
            "--max-completion-length",
            4,
            "--save-every",
            1,
            "--use_cpu",
            "true",
            "--disable_tqdm",
            "true",
        ]
        return [str(option) for option in (*given, *more)]

    return build


# Code that comes with a model.


@pytest.fixture
def model_with_code(tmp_path) -> tuple[Path, Path]:
    """A model whose configuration is code of its own, and the file that the code leaves behind."""
    trace, folder = tmp_path / "trace", tmp_path / "planted"
    folder.mkdir()
    code = f"import pathlib, transformers\npathlib.Path({str(trace)!r}).touch()\n"
    (folder / "planted.py").write_text(
        f"{code}class Config(transformers.PretrainedConfig):\n    model_type = 'planted'\n"
    )
    config = {"model_type": "planted", "architectures": ["Planted"], "auto_map": {"AutoConfig": "planted.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, trace


@pytest.mark.parametrize("asked", [False, True])
def test_a_models_code_runs_only_when_asked_for(command, model_with_code, tmp_path, asked, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks in the middle of a run"))
    folder, trace = model_with_code
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    more = ["--trust-remote-code"] if asked else []
    assert cli.main(command(folder, tmp_path / "run", "--steps", 1, *more)) == 2  # no such architecture, either way
    assert trace.exists() == asked
    assert ("trust_remote_code" in capsys.readouterr().err) == (not asked)


def test_inspecting_a_model_does_not_run_its_code(model_with_code, dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks in the middle of a run"))
    folder, trace = model_with_code
    arguments = [
        "inspect",
        "--model",
        folder,
        "--image",
        dataset / "0.png",
        "--prompt",
        "?",
        "--out",
        tmp_path / "page",
    ]
    assert cli.main([str(argument) for argument in arguments]) == 2
    assert not trace.exists() and not (tmp_path / "page").exists()


# Pickles.


def test_the_planted_pickle_works(tmp_path):
    torch.save(Planted(tmp_path / "trace"), tmp_path / "pickle")
    torch.load(tmp_path / "pickle", weights_only=False)
    assert (tmp_path / "trace").exists()


def test_weights_that_are_a_pickle_are_not_run(model, command, tmp_path, capsys):
    folder, trace = tmp_path / "model", tmp_path / "trace"
    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Planted(trace)}, folder / "pytorch_model.bin")
    assert cli.main(command(folder, tmp_path / "run", "--steps", 1)) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith(f"vgpo train: the weights of {folder} are damaged: ") and not trace.exists()


@pytest.mark.parametrize("form", ["archive", "plain"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_a_checkpoint_that_is_a_pickle_is_refused_and_not_run(tmp_path, name, form):
    trace = tmp_path / "trace"
    content = {"state": Planted(trace)}
    if form == "archive":
        torch.save(content, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=name):
        check_checkpoint(tmp_path)
    assert not trace.exists()


def test_a_run_is_resumed_without_reading_its_one_pickle(model, command, tmp_path):
    out, trace = tmp_path / "run", tmp_path / "trace"
    assert cli.main(command(model, out, "--steps", 1)) == 0
    assert (out / "checkpoint-1" / "training_args.bin").is_file()  # Trainer's, for people to look at
    torch.save(Planted(trace), out / "checkpoint-1" / "training_args.bin")
    assert cli.main(command(model, out, "--steps", 2)) == 0
    assert checkpoints(out)[-1].name == "checkpoint-2" and not trace.exists()
    for folder in (out / "model", out / "checkpoint-2"):
        assert load_file(folder / "model.safetensors")
        assert not list(folder.glob("pytorch_model*"))


# The sources.


def offences(source: str) -> list[str]:
    """Calls in a source that run a shell, unpickle, evaluate text or trust code that was not asked for."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        named = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        shell = named.get("shell", "False") != "False"
        text = name.startswith("subprocess.") and node.args and isinstance(node.args[0], ast.Constant | ast.JoinedStr)
        forbidden = name in ("os.system", "os.popen", "eval", "exec", "pickle.load", "pickle.loads", "joblib.load")
        forbidden |= name.startswith(("os.exec", "os.spawn", "subprocess.get")) or name in (
            "yaml.load",
            "marshal.loads",
        )
        trusting = named.get("trust_remote_code", "False") == "True"
        unescaped = name.endswith("Markup") and bool(node.args) and isinstance(node.args[0], ast.JoinedStr)
        unpickles = name == "torch.load" and named.get("weights_only") != "True"
        if shell or text or forbidden or trusting or unescaped or unpickles:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_run_no_shell_and_no_pickle(path):
    assert not offences(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "subprocess.run(command, shell=True)",
        "subprocess.run(f'ls {name}')",
        "os.system('ls')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.load(file)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "eval(text)",
        "Markup(f'<b>{name}</b>')",
    ],
)
def test_an_offence_would_be_found(source):
    assert offences(source)


def test_all_sources_are_looked_at():
    names = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {
        "setup.py",
        "python/vgpo_trainer/commands/train.py",
        "vgpo_kernels/backends.py",
        "benchmarks/measure.py",
    } <= names


# Pages.


def test_no_template_leaves_out_the_escaping():
    templates = sorted((ROOT / "python/vgpo_trainer/reports/templates").iterdir())
    assert {path.name for path in templates} == set(pages.ENVIRONMENT.list_templates())
    for path in templates:
        assert not re.search(r"\|\s*safe\b|autoescape|Markup", path.read_text(encoding="utf-8")), path.name
    text = pages.ENVIRONMENT.from_string("{{ text }} {{ [text] | join }} {{ data | tojson }}")
    assert "<" not in text.render(text=ATTACK, data={ATTACK: ATTACK})


def test_a_template_that_lacks_a_value_makes_no_page():
    with pytest.raises(jinja2.UndefinedError, match="'inspection' is undefined"):
        pages.render("inspection.html.j2", title="", digest="")


def test_a_report_escapes_the_names_of_runs_models_datasets_and_prompts(model, tmp_path, capsys):
    data, out = tmp_path / f"data{ATTACK}", tmp_path / f"run{ATTACK}"
    data.mkdir()
    for row in range(4):
        picture(row).save(data / f"{row}.png")
    lines = [json.dumps({"image": f"{row}.png", "prompt": ATTACK, "answer": ATTACK}) for row in range(4)]
    (data / "metadata.jsonl").write_text("\n".join(lines))
    planted = tmp_path / f"model{ATTACK}"
    shutil.copytree(model, planted)
    given = ["train", "--model", planted, "--dataset", data, "--out", out, "--batch-size", 4, "--generations", 4]
    given += ["--max-completion-length", 4, "--steps", 1, "--use_cpu", "true", "--run_name", ATTACK]
    assert cli.main([str(option) for option in given]) == 0
    assert cli.main(["report", str(out)]) == 0
    page = Page((out / "report.html").read_text())
    assert not {"script", "planted"} & set(page.tags)
    sources = [value for name, value in page.attributes if name == "src"]
    assert len(sources) == page.tags.count("img") and all(source.startswith("data:image/") for source in sources)
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_an_ablations_page_escapes_its_results(tmp_path):
    folder = demo_ablation.AblationFolder(tmp_path)
    settings = demo_ablation.AblationSettings()
    folder.open(settings.budget())
    run = demo_ablation.Run("dapo", 0, 0.3, 0.4, 1.0, 0.5, 1, 2.0, 1.5, 1, {"torch": f"{ATTACK}<script>"}, [0.5])
    folder.store(run)
    folder.store(demo_ablation.Run(**{**vars(run), "arm": ATTACK}))  # an arm that nobody knows has no row
    folder.budget.write_text(json.dumps({**settings.budget(), "steps": f"{ATTACK}<script>"}))
    assert cli.main(["ablate", "--out", str(tmp_path), "--report-only"]) == 0
    page, plot = (tmp_path / name for name in ("ablation.md", "images/ablation.svg"))
    assert "<script" not in page.read_text() and "<img" not in page.read_text() + plot.read_text()
    assert page.read_text().count("&lt;script&gt;") == 3  # the version, and the steps in words and in the command
