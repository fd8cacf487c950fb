"""Bad input to the adapters: every argument of what other codebases call refuses what it cannot use, and says so."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from bad_input import (
    Bad,
    Subject,
    boundaries,
    flags,
    floating,
    integers,
    mask,
    numbers,
    subject,
    subjects,
    whole_numbers,
    without,
)

from vgpo_kernels import VGPOConfig
from vgpo_kernels.integrations import easyr1, surface, tensor_parallel

transformers = pytest.importorskip("transformers")
from vgpo_kernels.integrations import transformers as adapter  # noqa: E402

IDS = torch.tensor([[7, 5, 5, 1, 2, 3], [7, 5, 5, 1, 2, 3]])
ANSWERED = torch.ones(2, 3, dtype=torch.bool)


def tiny_model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def run(capture: Callable[..., AbstractContextManager[Any]]) -> Callable[..., None]:
    """Return a function of a capture's arguments that does one forward pass in its block."""

    def call(**arguments: Any) -> None:
        with capture(**arguments):
            MODEL(IDS)

    call.__signature__ = inspect.signature(capture)  # type: ignore[attr-defined]
    return call


MODEL = tiny_model()
NO_MODEL = [Bad("no model", SimpleNamespace(), TypeError, "SimpleNamespace")]
NO_LAYER = [
    Bad("out of range", [2], ValueError, r"layers must lie in \[-2, 2\).*got \[2\]"),
    Bad("none", [], ValueError, r"layers must lie in \[-2, 2\)"),
    Bad("a fraction", [0.5], TypeError, r"layers must be integers, got \[0.5\]"),
    Bad("one", 1, TypeError, r"layers must be a sequence of integers, \(-1,\) say, got 1"),
    Bad("all", "all", TypeError, "layers must be a sequence of integers.*got 'all'"),
    Bad("text", ["last"], TypeError, r"layers must be integers, got \['last'\]"),
]
NO_FUNCTION = [Bad("text", "sum", TypeError, "consumer must be callable, got str")]
NO_NORM = [
    Bad("unknown", "model.ln_out", ValueError, "LlamaForCausalLM has no module model.ln_out"),
    Bad("of another model", torch.nn.LayerNorm(8), ValueError, "LlamaForCausalLM has no module LayerNorm"),
    Bad("the model itself", "", ValueError, "LlamaForCausalLM has no module"),
    Bad("a number", 3, TypeError, "norm must be a module or its name, got int"),
]
NO_TOKENS = [
    Bad("text", ("<image>",), TypeError, "visual_tokens must be.*<image>"),
    Bad("a text-only model", MODEL, ValueError, "not a vision-language model"),
]
# Any number of last positions may be the response.
NO_FIT = r"response_mask must have shape \[2, T\] with T <= 6 .* of input_ids int64\[2, 6\] on cpu\), got bool"
NO_ANSWER = [
    *(one for one in mask(ANSWERED) if one.why not in ("1 of dimension 1", "2 of dimension 1")),
    Bad("longer than the ids", torch.ones(2, 7, dtype=torch.bool), ValueError, NO_FIT + r"\[2, 7\]"),
    Bad("of more rows", torch.ones(3, 2, dtype=torch.bool), ValueError, NO_FIT + r"\[3, 2\]"),
    Bad("packed", torch.ones(12, dtype=torch.bool), ValueError, NO_FIT + r"\[12\]"),
    Bad("elsewhere", ANSWERED.to("meta"), ValueError, "response_mask must be on cpu like input_ids, got .*meta"),
]
NUMBERED = [bad for bad in integers(IDS) if bad.why in ("a list", "text", "numpy", "sparse", "float32", "bool", "NaN")]
NO_SETTINGS = [
    Bad("text", "paper", TypeError, "settings must be a mapping, got str"),
    Bad("another preset", {"preset": "published"}, ValueError, "preset.*'published'"),
    Bad("an unknown field", {"betta": 1.0}, ValueError, "betta"),
    Bad("out of range", {"beta": -1.0}, ValueError, "beta must be >= 0, got -1.0"),
    Bad("a number as a clamp", {"intra_clamp": 0.5}, TypeError, "intra_clamp.*0.5"),
    Bad("text as a clamp", {"inter_clamp": "none"}, TypeError, "inter_clamp.*'none'"),
    Bad("one number of a clamp", {"inter_clamp": [0.5]}, (TypeError, ValueError), r"inter_clamp.*0.5"),
]
SCRIPT = [
    Bad("out of range", {"visual_compensation_strength": -1}, ValueError, "beta must be >= 0, got -1"),
    Bad("unused by the authors", {"inter_reweighting_gamma_late": 0.7}, ValueError, "gamma_late.*got 0.7"),
]
CONFIGS = [Bad(f"{value!r}", value, TypeError, "config must be a VGPOConfig") for value in ("paper", {}, None)]


def capturing_masses() -> Subject:
    return Subject(
        run(adapter.capture_attention_mass),
        {"model": MODEL, "segments": IDS % 3},
        {
            "model": NO_MODEL,
            "segments": [
                *NUMBERED,
                Bad("one row", (IDS % 3)[0], ValueError, r"segments must have shape \[B, S\].*\[6\]"),
                Bad("too many rows", torch.zeros(3, 6, dtype=torch.int64), ValueError, "segments has 3 rows"),
                Bad("too large", IDS % 3 + 1, ValueError, "key_segments must be below num_segments=3.*got 3"),
            ],
            "layers": NO_LAYER,
            "num_segments": whole_numbers(0, -1),
            "later_segment": [
                Bad("too large", 3, ValueError, "later_segment.*num_segments=3, got 3"),
                Bad("text", "generated", ValueError, "later_segment.*'generated'"),
            ],
            "last": whole_numbers(0, -1),
            "per_head": flags(),
            "differentiable": flags(),
            "norm": NO_NORM,
        },
    )


def reweighting(packed: bool) -> Subject:
    values = torch.rand(6) if packed else torch.rand(2, 3)
    good = {
        "advantages": values,
        "cos": values,
        "response_mask": values > -1,
        "prompts": ["a", "a"],
        "config": VGPOConfig(),
    }
    bad = {
        "advantages": floating(values),
        "cos": floating(values),
        "response_mask": [one for one in mask(values > -1) if one.error is ValueError or "list" in one.says],
        "prompts": [
            Bad("one too few", ["a"], ValueError, "prompts must name 2 responses, got 1"),
            Bad("a column", torch.ones(2, 1), ValueError, r"prompts must have one dimension.*\[2, 1\]"),
            Bad("an array of rows", numpy.array([["a"], ["b"]]), ValueError, r"prompts must have one.*\[2, 1\]"),
            Bad("sparse", torch.ones(2).to_sparse(), TypeError, "prompts must be a dense torch.Tensor"),
            Bad("text", "ab", TypeError, "prompts must be a list.*got str"),
            Bad("a dict", {"a": 1, "b": 2}, TypeError, "prompts must be a list.*got dict"),
            *(
                Bad(f"names of {kind}", names, TypeError, f"prompts must be integers or strings, got {kind}")
                for kind, names in {
                    "float": torch.ones(2),
                    "bool": torch.ones(2, dtype=torch.bool),
                    "Tensor": list(torch.ones(2, dtype=torch.int64)),
                    "NoneType": numpy.array(["a", None], dtype=object),
                    "list": [["a"], ["a"]],
                }.items()
            ),
        ],
        "config": CONFIGS,
    }
    if packed:
        good["cu_seqlens"] = torch.tensor([0, 3, 6])
        bad["cu_seqlens"] = boundaries(good["cu_seqlens"])
    return Subject(surface.reweight, good, bad)


def head_in_parallel() -> Subject:
    good = {"hidden": torch.rand(4, 6), "weight": torch.rand(5, 6), "targets": torch.arange(4), "first": 0}
    # What is refused is refused before a process group is asked for anything, and without one.
    return subject(tensor_parallel.parallel_logprob, good | {"bias": torch.rand(5)})


def losses_in_parallel() -> dict[str, Subject]:
    """What a loss of the whole head refuses, but ids that are rows of another rank."""
    names, whole = ("policy_loss", "vgpo_loss"), subjects()
    found = {}
    for name in names:
        made = whole[f"linear_{name}, packed"]
        elsewhere = [bad.why for bad in made.bad["targets"] if re.fullmatch(r"\d+ of \d+", bad.why)]
        bad = made.bad | {"targets": without(made.bad["targets"], *elsewhere), "first": whole_numbers(-1)}
        found[f"parallel_{name}"] = Subject(getattr(tensor_parallel, f"parallel_{name}"), made.good | {"first": 0}, bad)
    return found


def policy_of_easyr1() -> Subject:
    values, answered = torch.rand(2, 3), ANSWERED
    good = {"old_log_probs": values, "log_probs": values, "advantages": values, "response_mask": answered}
    good |= {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3, "clip_ratio_dual": 3.0}

    def renamed(bad: list[Bad], name: str) -> list[Bad]:
        """What this library's loss says, under its own name of the argument."""
        return [one._replace(says=rf"{name}\b.*({one.says})|({one.says}).*\b{name}") for one in bad]

    return Subject(
        easyr1.compute_policy_loss,
        good,
        {
            "old_log_probs": renamed(floating(values), "old_logp"),
            "log_probs": renamed(floating(values), "logp"),
            "advantages": floating(values),
            "response_mask": [one for one in mask(answered) if one.why not in ("float32", "complex64")],
            "tau_positive": renamed(numbers(0.0), "sapo_temperature_positive"),
            "tau_negative": renamed(numbers(0.0), "sapo_temperature_negative"),
            "clip_ratio_low": renamed(numbers(-0.1), "epsilon_low"),
            "clip_ratio_high": renamed(numbers(-0.1), "epsilon_high"),
            "clip_ratio_dual": renamed(numbers(0.5), "dual_clip"),
            "loss_type": [Bad("another", "ppo", ValueError, "loss_type must be one of.*'ppo'")],
            "loss_avg_mode": [
                Bad("another", "tokens", ValueError, "loss_avg_mode must be one of token, seq, got 'tokens'")
            ],
        },
    )


def spoiling() -> Subject:
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    unknown = [
        Bad("a model of text", MODEL, ValueError, "llama has none of image_token_id"),
        Bad("no model", SimpleNamespace(), ValueError, "SimpleNamespace has none of image_token_id"),
    ]
    return Subject(
        adapter.spoilt_view,
        {
            "inputs": {"input_ids": IDS, "pixel_values": pixels},
            "kind": "swap",
            "model": transformers.LlavaConfig(image_token_index=5),
        },
        {
            "inputs": [Bad("a list", [IDS], TypeError, "inputs must be a mapping of a model's arguments, got list")],
            "kind": [Bad(f"{one!r}", one, ValueError, f"kind must be one of .*{one!r}") for one in ("blur", 3, None)],
            "model": unknown,
            "strength": [Bad("of a swap", 0.5, ValueError, "swap has no strength, got strength=0.5")],
            "seed": whole_numbers(-1),
            "response_mask": NO_ANSWER,
            "groups": [
                Bad("one too few", ["a"], ValueError, "groups must name the 2 rows of the batch, got 1"),
                Bad("a number", 3, TypeError, "groups must be a list.*got int"),
                Bad("all one", [1, 1], ValueError, "swap finds no other image"),
            ],
            "sources": [
                Bad("a number", 3, TypeError, "sources must be a mapping.*got int"),
                Bad("without images", {}, ValueError, "sources must hold images as inputs do, in pixel_values"),
            ],
        },
    )


NO_MASK = [
    *(one for one in mask(IDS == 5) if one.why in ("a list", "text", "numpy", "sparse", "float32", "complex64")),
    Bad("one row", (IDS == 5)[0], ValueError, r"visual_mask must have shape \[B, S\], got bool\[6\]"),
    Bad("of more rows", torch.zeros(3, 6, dtype=torch.bool), ValueError, "visual_mask has 3 rows.* a batch of 2"),
]


def tiny_vision_model() -> Any:
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**size, image_size=8, patch_size=4, projection_dim=8),
        text_config=transformers.LlamaConfig(**size, vocab_size=16),
        image_token_index=5,
    )
    return transformers.LlavaForConditionalGeneration(config)


def reusing(model: Any) -> None:
    with adapter.reuse_vision_tower(model):
        pass


SUBJECTS = {
    "blind_attention": Subject(
        run(adapter.blind_attention),
        {"model": MODEL, "visual_mask": IDS == 5},
        {"model": NO_MODEL, "visual_mask": NO_MASK, "norm": NO_NORM},
    ),
    "reuse_vision_tower": Subject(
        reusing,
        {"model": tiny_vision_model()},
        {"model": [*NO_MODEL, Bad("without images", MODEL, TypeError, "LlamaForCausalLM has no get_image_features")]},
    ),
    "spoilt_view": spoiling(),
    "attention_segments": Subject(
        adapter.attention_segments,
        {"input_ids": IDS, "visual_tokens": (5,), "attention_mask": IDS > 0, "response_mask": ANSWERED},
        {
            "input_ids": [*NUMBERED, Bad("one row", IDS[0], ValueError, r"input_ids must have shape \[B, S\].*\[6\]")],
            "visual_tokens": NO_TOKENS,
            "attention_mask": mask(IDS > 0),
            "response_mask": NO_ANSWER,
        },
    ),
    "capture_attention": Subject(
        run(adapter.capture_attention),
        {"model": MODEL, "consumer": print},
        {"model": NO_MODEL, "consumer": NO_FUNCTION, "layers": NO_LAYER, "norm": NO_NORM},
    ),
    "capture_attention_mass": capturing_masses(),
    "capture_hidden_states": Subject(
        run(adapter.capture_hidden_states),
        {"model": MODEL},
        {"model": NO_MODEL, "consumer": NO_FUNCTION, "norm": NO_NORM},
    ),
    "capture_layer_mean": Subject(
        run(adapter.capture_layer_mean),
        {"model": MODEL, "reduce": torch.mean},
        {
            "model": NO_MODEL,
            "reduce": [Bad("text", "sum", TypeError, "reduce must be callable, got str")],
            "layers": [
                Bad("out of range", [3], ValueError, r"layers must lie in \[-3, 3\).*got \[3\]"),
                *(one for one in NO_LAYER if one.error is TypeError),
            ],
            "norm": NO_NORM,
        },
    ),
    "decoder_of": Subject(adapter.decoder_of, {"model": MODEL}, {"model": NO_MODEL, "norm": NO_NORM}),
    "final_norm": Subject(adapter.final_norm, {"model": MODEL}, {"model": NO_MODEL, "norm": NO_NORM}),
    "visual_mask": Subject(
        adapter.visual_mask,
        {"input_ids": IDS, "visual_tokens": (5,), "response_mask": ANSWERED},
        {"input_ids": NUMBERED, "visual_tokens": NO_TOKENS, "response_mask": NO_ANSWER},
    ),
    "visual_mask, packed": Subject(
        adapter.visual_mask,
        {"input_ids": IDS[0], "visual_tokens": (5,), "response_mask": IDS[0] < 5},
        {"response_mask": mask(IDS[0] < 5)},
    ),
    "visual_token_ids": Subject(
        adapter.visual_token_ids,
        {"model_or_config": MODEL, "processor": SimpleNamespace(image_token_id=5)},
        {
            "model_or_config": [
                Bad("cross-attention", transformers.MllamaConfig(), ValueError, "mllama reads its images")
            ],
            "processor": [
                Bad("none", None, ValueError, "llama has none of image_token_id"),
                Bad("of text", SimpleNamespace(), ValueError, "llama has none of image_token_id.*nor its processor"),
            ],
        },
    ),
    "reweight, padded": reweighting(packed=False),
    "reweight, packed": reweighting(packed=True),
    "config_from": Subject(surface.config_from, {"settings": {"beta": 0.5}}, {"settings": NO_SETTINGS}),
    "parallel_logprob": head_in_parallel(),
    **losses_in_parallel(),
    "authors_config": Subject(easyr1.authors_config, {"settings": {}}, {"settings": SCRIPT}),
    "patch_easyr1": Subject(
        easyr1.patch_easyr1, {"config": VGPOConfig.paper()}, {"config": CONFIGS, "replace_loss": flags()}
    ),
    "compute_policy_loss": policy_of_easyr1(),
}
# unwrap() takes anything, and hands back what wraps nothing. What it is called on in an error is the model.
ANYTHING = {"unwrap", "logit_maps"}
CASES = [pytest.param(made, name, id=f"{label}: {name}") for label, made in SUBJECTS.items() for name in made.bad]


def test_the_table_has_every_function_for_transformers() -> None:
    functions = {name for name in adapter.__all__ if inspect.isfunction(getattr(adapter, name))}
    assert functions - ANYTHING == functions & set(SUBJECTS)
    for name in functions & set(SUBJECTS):
        assert SUBJECTS[name].arguments() == set(SUBJECTS[name].bad), name


@pytest.mark.parametrize(("made", "name"), CASES)
def test_what_is_bad_is_refused(made: Subject, name: str) -> None:
    for why, value, error, says in made.bad[name]:
        # sapo's temperatures are not read by another loss.
        kind = {"loss_type": "sapo"} if name.startswith("tau") else {}
        with pytest.raises(error) as caught:
            made.function(**(made.good | kind | {name: value}))
        assert re.search(says, str(caught.value), re.DOTALL), f"{name} {why}: {caught.value}"


@pytest.mark.parametrize("label", [name for name in SUBJECTS if not name.startswith(("parallel_", "patch_"))])
def test_what_is_good_is_accepted(label: str) -> None:
    SUBJECTS[label].function(**SUBJECTS[label].good)


def test_names_of_prompts_may_be_a_tensor_an_array_or_a_list() -> None:
    """Elements of a tensor are tensors, each of which is another key of a dict."""
    numbers, cpu = [7, 3, 7, 9], torch.device("cpu")
    words = [str(number) for number in numbers]
    kinds = [numbers, words, numpy.array(numbers), numpy.array(words), numpy.array(words, dtype=object)]
    kinds += [list(numpy.array(numbers)), tuple(words), torch.tensor(numbers), torch.tensor(numbers, dtype=torch.int32)]
    for names in kinds:
        assert surface.group_numbers(names, cpu).tolist() == [0, 1, 0, 2], names
    values = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    scored = values > -1
    expected, metrics = surface.reweight(values, values, scored, numbers, VGPOConfig.paper())
    assert metrics["vgpo/groups"] == 3
    assert metrics["vgpo/singleton_groups"] == 2
    for names in kinds:
        found = surface.reweight(values, values, scored, names, VGPOConfig.paper())
        assert torch.equal(found[0], expected)
        assert found[1] == metrics
