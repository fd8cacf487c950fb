"""``vgpo inspect``: what it reads from a model, and a page that is complete, self-contained and safe in a browser."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from PIL import Image
from trainer.test_report import Page
from trainer.tiny_runs import FAMILIES, llava, picture, qwen2_5_vl
from vgpo_trainer import Inspection, inspect_answer
from vgpo_trainer.cli import main
from vgpo_trainer.demo.warm_start import SHIPPED
from vgpo_trainer.reports.inspection import build_page

from vgpo_kernels import VGPOConfig, visual_focus, visual_weights

OWNED = "document.body.dataset.owned=1"
ATTACK = f'</script></title>"><script>{OWNED}</script><img src=x onerror="{OWNED}">'
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SCREENSHOTS = Path(os.environ.get("VGPO_SCREENSHOTS", Path(__file__).parents[2] / "build" / "screenshots"))


def inspection(**changes) -> Inspection:
    fields = {
        "model": "a model",
        "prompt": "Add the digits.",
        "image_name": "digits.png",
        "picture": Image.new("RGB", (48, 48), "white"),
        "tokens": ["1", "+", "\n", "<eos>"],
        "shares": [(0.5, 0.4, 0.1), (0.4, 0.4, 0.2), (0.3, 0.4, 0.3), (0.2, 0.2, 0.6)],
        "cos": [0.5, -0.25, 0.1, math.nan],
        "psi": [0.2, -0.1, 0.0, -0.1],
        "factors": [1.2, 0.9, 1.0, math.nan],
        "maps": [[0.3, 0.1, 0.1, 0.0], [0.0, 0.4, 0.0, 0.0], [0.1, 0.1, 0.1, 0.0], [0.0, 0.0, 0.0, 0.2]],
        "grid": (2, 2),
        "layers": [0, 1],
    }
    return Inspection(**{**fields, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_what_eager_attention_and_the_definition_say(family):
    model, processor = {"llava": llava, "qwen2_5_vl": qwen2_5_vl}[family]()
    model.eval()
    image, prompt = picture(3), "Add the digits."
    found = inspect_answer(model, processor, image, prompt, max_new_tokens=6, layers=(-1,))
    number = len(found.tokens)
    assert number > 0 and found.layers == [model.config.get_text_config().num_hidden_layers - 1]

    content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        visual = [model.config.image_token_id, *filter(None, [getattr(model.config, "video_token_id", None)])]
        sequence = model.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=visual)
        inputs = {**inputs, "input_ids": sequence, "attention_mask": torch.ones_like(sequence)}
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = (sequence == model.config.image_token_id).int()
        model.set_attn_implementation("eager")
        output = model(**inputs, output_attentions=True, output_hidden_states=True)
    weights = output.attentions[-1][0, :, -number:].mean(0)  # [tokens, S]
    shown = (sequence[0] == model.config.image_token_id)[:-number]
    prompt_weights = weights[:, :-number]
    image_share, rest = prompt_weights[:, shown], prompt_weights[:, ~shown]
    shares = torch.stack([image_share.sum(1), rest.sum(1), weights[:, -number:].sum(1)], dim=1)
    torch.testing.assert_close(torch.tensor(found.shares), shares, atol=1e-4, rtol=0)
    assert found.grid is not None and math.prod(found.grid) == int(shown.sum())
    torch.testing.assert_close(torch.tensor(found.maps), image_share, atol=1e-4, rtol=0)

    mask = torch.ones(1, number, dtype=torch.bool)
    images = torch.nn.functional.pad(shown, (0, number))[None]
    cos = visual_focus(output.hidden_states[-1], images, mask)
    weighed = visual_weights(cos, mask, torch.zeros(1, dtype=torch.int64), VGPOConfig.paper())
    torch.testing.assert_close(torch.tensor(found.cos), cos[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(found.factors), weighed.factors[0], atol=1e-2, rtol=0)
    assert found.tokens == [processor.tokenizer.decode([token]) for token in sequence[0, -number:].tolist()]


def test_every_text_is_escaped_and_nothing_is_fetched():
    text = build_page(inspection(model=ATTACK, prompt=ATTACK, image_name=ATTACK, tokens=[ATTACK] * 4))
    page = Page(text)
    assert page.tags.count("script") == 2 and page.tags.count("img") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    # In the headline twice, in the title, and once a token; the data of the script has it in escapes.
    assert page.text.count(ATTACK) == 4 + 4
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 1 and sources[0].startswith("data:image/")
    script = text.split("<script>")[1].split("</script>")[0]
    policy = next(value for name, value in page.attributes if name == "content" and value.startswith("default-src"))
    assert policy.startswith("default-src 'none'")
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert "<" not in data and json.loads(data)["tokens"] == [ATTACK] * 4
    assert "url(" not in text and "@import" not in text


def test_a_page_without_a_grid_says_so():
    page = Page(build_page(inspection(grid=None, maps=[])))
    assert "no single grid" in page.text and "overlay" not in [value for name, value in page.attributes if name == "id"]


def test_an_inspection_as_json_and_in_a_line():
    found = inspection()
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert set(data) == {field.name for field in dataclasses.fields(found)} - {"picture"} | {"size"}
    assert data["shares"] == {
        "image": [0.5, 0.4, 0.3, 0.2],
        "question": [0.4, 0.4, 0.4, 0.2],
        "generated": [0.1, 0.2, 0.3, 0.6],
    }
    assert data["cos"] == [0.5, -0.25, 0.1, None] and data["size"] == [48, 48] and data["grid"] == [2, 2]
    line = "<Inspection: 'Add the digits.' -> '1+\\n<eos>', 4 tokens, 35.0% on the image>"
    assert repr(found) == line
    assert len(repr(inspection(prompt="why? " * 1000, tokens=["word "] * 1000, shares=[(math.nan,) * 3]))) < 250


def test_a_notebook_shows_the_page_in_a_frame(tmp_path):
    found = inspection(prompt=ATTACK)
    page = Page(found._repr_html_())
    assert page.tags == ["iframe"] and page.text == ""
    attributes = dict(page.attributes)
    assert attributes["srcdoc"] == build_page(found) == found.save(tmp_path / "page.html").read_text(encoding="utf-8")
    assert attributes["sandbox"] == "allow-scripts"  # and no more: its script does not reach the notebook


def test_the_command_writes_a_page(tmp_path, capsys):
    """From a checkpoint that ships, of an image whose name is an attack."""
    image = tmp_path / '"><script>alert(1)<script>.png'
    picture(1).save(image)
    arguments = ["inspect", "--model", str(SHIPPED), "--image", str(image), "--out", str(tmp_path / "page.html")]
    assert main([*arguments, "--prompt", ATTACK, "--max-new-tokens", "5"]) == 0
    assert str(tmp_path / "page.html") in capsys.readouterr().out
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert ATTACK in page.text and image.name in page.text
    assert page.tags.count("script") == 2 and page.tags.count("rect") == 9


def test_a_model_of_the_hub_is_asked_for(tmp_path, monkeypatch, capsys):
    def refuse(name: str, *, local_files_only: bool = False, **_: object) -> None:
        assert name == "org/model" and not local_files_only
        raise ImportError("\nit needs torchvision\n")

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", refuse)
    picture(1).save(tmp_path / "image.png")
    command = ["inspect", "--model", "org/model", "--image", str(tmp_path / "image.png"), "--prompt", "Add."]
    assert main(command) == 2
    assert capsys.readouterr().err == "vgpo inspect: it needs torchvision\n"


def test_what_cannot_be_inspected_is_said_in_a_line(tmp_path, capsys):
    image = tmp_path / "image.png"
    image.write_text("no image")
    command = ["inspect", "--model", str(SHIPPED), "--prompt", "Add.", "--out", str(tmp_path / "page.html")]
    assert main([*command, "--image", str(image)]) == 2
    assert "no image that Pillow can read" in capsys.readouterr().err
    assert main([*command, "--image", str(tmp_path / "absent.png")]) == 2
    picture(1).save(image)
    assert main([*command, "--image", str(image), "--layers", "0,7"]) == 2
    assert "layers must lie in [-4, 4)" in capsys.readouterr().err
    assert main([*command, "--image", str(image), "--model", str(tmp_path)]) == 2
    assert main([*command, "--image", str(image), "--out", str(tmp_path / "no" / "page.html")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Run a headless browser on a page, and return what it prints."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the path")
    profile = tmp_path_factory.mktemp("profile")

    def run(address: str, *options: str) -> str:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", "--virtual-time-budget=2000", *options, address]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    return run


def words(dom: str, name: str) -> str:
    """The text of an element that has an id and no elements inside."""
    return re.search(rf'id="{name}"[^>]*>([^<]*)<', dom).group(1)


@pytest.fixture(scope="module")
def shipped_page(tmp_path_factory) -> Path:
    """The page of a held-out problem, answered by the checkpoint that ships."""
    from vgpo_trainer.demo.digits import PROMPT, make_problems

    folder = tmp_path_factory.mktemp("inspect")
    make_problems(7, "held_out", 5)[6].image.save(folder / "digits.png")
    arguments = ["--image", str(folder / "digits.png"), "--prompt", PROMPT, "--out", str(folder / "page.html")]
    assert main(["inspect", "--model", str(SHIPPED), *arguments]) == 0
    return folder / "page.html"


def test_a_browser_shows_the_page(browse, shipped_page):
    """Read back from the page after its script ran under its own policy; the screenshot is kept."""
    data = json.loads(
        re.search(r'id="data">(.*?)</script>', shipped_page.read_text(encoding="utf-8"), re.DOTALL).group(1)
    )
    dom = browse(f"{shipped_page.as_uri()}#token=2", "--dump-dom")
    assert words(dom, "what").startswith(f"2 of {len(data['tokens'])}:")
    for index, name in enumerate(("image", "question", "generated")):
        assert words(dom, name) == f"{100 * data['shares'][1][index]:.1f}%"
    assert words(dom, "factor") == f"{data['factors'][1]:.2f}"
    assert words(dom, "peak") == f"{100 * data['peaks'][1]:.1f}%"
    colours = re.findall(r'<rect [^>]*style="fill: (rgb\([^)]*\))', dom)
    assert len(colours) == 9 and len(set(colours)) > 1
    assert "held" in re.findall(r'<span class="(token[^"]*)"', dom)[1]

    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    shot = SCREENSHOTS / "inspect.png"
    shot.unlink(missing_ok=True)
    browse(f"{shipped_page.as_uri()}#token=2", "--window-size=1200,1440", f"--screenshot={shot}")
    with Image.open(shot) as image:
        assert image.size == (1200, 1440)
        # Ink, the curves' colours and the map, not a blank page.
        assert len(image.convert("RGB").resize((300, 360)).getcolors(300 * 360)) > 500


CELL = """
<script>
addEventListener("message", (event) => {
  document.body.append(Object.assign(document.createElement("pre"), { id: "read", textContent: event.data }));
});
</script>
"""


def test_the_page_works_in_a_cell(browse, tmp_path):
    """In its sandbox, under its policy; the frame says what it shows once its script ran."""
    frame = inspection()._repr_html_()
    # The page's own script is the only one that its policy lets run, so the test's goes without the policy.
    told = "<script>parent.postMessage(document.getElementById('factor').textContent, '*')</script></body>"
    shown = html.unescape(frame)
    shown = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", shown).replace("</body>", told)
    (source,) = re.findall(r'srcdoc="(.*)" sandbox', shown, re.DOTALL)
    path = tmp_path / "cell.html"
    path.write_text(f'{CELL}<iframe srcdoc="{html.escape(source)}" sandbox="allow-scripts"></iframe>', encoding="utf-8")
    assert words(browse(path.as_uri(), "--dump-dom"), "read") == "1.03"


POINTER = """
<script>
const read = () => ["what", "image", "peak", "factor"].map((id) => document.getElementById(id).textContent);
const tokens = document.querySelectorAll("#tokens .token");
const readings = [read()];
tokens[1].dispatchEvent(new PointerEvent("pointerenter")); readings.push(read());
document.getElementById("tokens").dispatchEvent(new PointerEvent("pointerleave")); readings.push(read());
tokens[0].click(); tokens[0].focus();
tokens[0].dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
// A window in the background, as a headless one may be, moves the focus and sends no event.
if (!document.hasFocus()) tokens[1].dispatchEvent(new FocusEvent("focus"));
readings.push(read(), [document.activeElement === tokens[1]]);
document.getElementById("overlay").click();
readings.push([getComputedStyle(document.getElementById("map")).display]);
const result = Object.assign(document.createElement("pre"), { id: "read", textContent: JSON.stringify(readings) });
document.body.append(result);
</script>
"""


def test_pointing_at_tokens(browse, tmp_path):
    path = tmp_path / "page.html"
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", build_page(inspection()))
    path.write_text(text.replace("</main>", f"</main>{POINTER}"), encoding="utf-8")
    whole, pointed, left, stepped, focused, hidden = json.loads(
        words(browse(path.as_uri(), "--dump-dom"), "read").replace("&quot;", '"')
    )
    assert whole == ["the whole answer", "35.0%", "15.0%", "1.03"]
    assert pointed == ['2 of 4:  "+"', "40.0%", "40.0%", "0.90"]
    assert left == whole and stepped == pointed
    assert focused == [True] and hidden == ["none"]


def test_nothing_that_was_planted_runs(browse, tmp_path):
    """Even without the policy, which would stop it again."""
    path = tmp_path / "page.html"
    text = build_page(inspection(model=ATTACK, prompt=ATTACK, image_name=ATTACK, tokens=[ATTACK] * 4))
    path.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text), encoding="utf-8")
    dom = browse(f"{path.as_uri()}#token=1", "--dump-dom")
    assert "data-owned" not in dom
    assert words(dom, "what").startswith("1 of 4:")
    # The check can fail: what is planted unescaped does run.
    path.write_text(f"<body>{ATTACK}</body>", encoding="utf-8")
    assert "data-owned" in browse(path.as_uri(), "--dump-dom")
