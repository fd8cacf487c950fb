"""Every argument of every public function, and the values that it must refuse, each with what the error must say."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy
import torch
from cases import Response, make_batch
from linear_cases import with_predicting_rows
from test_attention_mass import draw
from torch import Tensor

import vgpo_kernels
from vgpo_kernels import PolicyLossOptions, ShapingConfig, VGPOConfig, ViewTerm
from vgpo_kernels.ops import policy_loss as policy_ops

NAN, INFINITY = float("nan"), float("inf")
VOCABULARY = 7


class Bad(NamedTuple):
    """A value that is wrong for an argument."""

    why: str
    value: Any
    error: type[Exception] | tuple[type[Exception], ...]
    says: str  # what the message says of the value, a regular expression


# ---- what can be wrong with one kind of argument -----------------------------------------------------------------


def of_another_type(good: Tensor) -> list[Bad]:
    return [
        Bad("a list", good.tolist(), TypeError, "list"),
        Bad("text", "1", TypeError, "str"),
        Bad("numpy", numpy.zeros(tuple(good.shape)), TypeError, "ndarray"),
        Bad("sparse", torch.zeros(good.shape).to_sparse(), TypeError, "sparse_coo"),
    ]


def of_another_dtype(good: Tensor, *dtypes: torch.dtype) -> list[Bad]:
    name = {dtype: str(dtype).removeprefix("torch.") for dtype in dtypes}
    return [Bad(name[dtype], good.nan_to_num().to(dtype), TypeError, name[dtype]) for dtype in dtypes]


def elsewhere(good: Tensor) -> list[Bad]:
    return [Bad("on another device", good.to("meta"), ValueError, "meta")]


def of_another_shape(good: Tensor) -> list[Bad]:
    """Other ranks, other lengths, and the lengths of 1 that broadcasting would take."""
    wrong = {"a number": good.reshape(-1)[0], "one dimension more": good[None]}
    for dim, length in enumerate(good.shape):
        wrong |= {f"{size} of dimension {dim}": good.narrow(dim, 0, size) for size in {1, length - 1} if size < length}
    return [Bad(why, value, ValueError, shape_of(value)) for why, value in wrong.items()]


def shape_of(tensor: Tensor) -> str:
    """Regular expression of a shape, or of as much of it as a message about rows or tokens says."""
    sizes = [str(size) for size in tensor.shape]
    parts = [re.escape(f"[{', '.join(sizes[:count])}]") for count in {len(sizes), max(len(sizes) - 1, 1)}]
    # One number a token, of queries or keys [B, H, T, d] and [N, H, d]; the packed length.
    parts += [re.escape(f"[{', '.join(sizes[::2])}]")] if tensor.dim() == 4 else []
    return "|".join(parts + ([rf"\b{sizes[0]}\b"] if sizes else []))


def floating(good: Tensor) -> list[Bad]:
    return [
        *of_another_type(good),
        *of_another_dtype(good, torch.int64, torch.bool, torch.complex64),
        *of_another_shape(good),
        *elsewhere(good),
    ]


def mask(good: Tensor) -> list[Bad]:
    dtypes = (torch.float32, torch.complex64)
    return [*of_another_type(good), *of_another_dtype(good, *dtypes), *of_another_shape(good), *elsewhere(good)]


def integers(good: Tensor) -> list[Bad]:
    return [
        *of_another_type(good),
        *of_another_dtype(good, torch.float32, torch.bool, torch.complex64),
        Bad("NaN", torch.full(good.shape, NAN), TypeError, "float32"),
        *of_another_shape(good),
        *elsewhere(good),
    ]


def boundaries(good: Tensor) -> list[Bad]:
    turned = good.clone()
    turned[1], turned[2] = good[2], good[1]
    beyond = good.clone()
    beyond[2] = good[-1] + 100
    negative = good.clone()
    negative[1] = -1
    wrong = {
        "decreasing": turned,
        "beyond the end": beyond,
        "negative": negative,
        "not from 0": good + 1,
        "short of the end": torch.cat([good[:-1], good[-1:] - 1]),
        "without its end": good[:-1],
        "without its start": good[1:],
    }
    return [
        *of_another_type(good),
        *of_another_dtype(good, torch.float32, torch.bool, torch.int16),
        *(Bad(why, value, ValueError, re.escape(str(value.tolist()))) for why, value in wrong.items()),
        *(
            Bad(f"of shape {list(bad.shape)}", bad, ValueError, shape_of(bad))
            for bad in (good[None], good[:0], good[0])
        ),
        *elsewhere(good),
    ]


def numbers(*outside: float, finite: bool = True) -> list[Bad]:
    return [
        Bad("text", "1", TypeError, "str|'1'"),
        Bad("a bool", True, TypeError, "bool|True"),
        Bad("a list", [0.5], TypeError, "list|0.5"),
        Bad("a tensor", torch.tensor(0.5), TypeError, "Tensor|tensor"),
        Bad("NaN", NAN, ValueError, "nan"),
        *(Bad(f"{value}", value, ValueError, re.escape(str(value))) for value in (INFINITY, -INFINITY) if finite),
        *(Bad(f"{value}", value, ValueError, re.escape(str(value))) for value in outside),
    ]


def temperatures() -> list[Bad]:
    return [
        *(bad for bad in numbers(0.0, -1.0) if bad.why != "a tensor"),
        Bad("a tensor of one", torch.tensor(0.5), ValueError, r"\[\]"),
        Bad("a tensor of integers", torch.tensor(1), TypeError, "int64"),
        Bad("sparse", torch.ones(1).to_sparse(), TypeError, "sparse_coo"),
    ]


def whole_numbers(*outside: int) -> list[Bad]:
    return [
        Bad("text", "1", TypeError, "str"),
        Bad("a bool", True, TypeError, "bool"),
        Bad("a fraction", 1.5, TypeError, "float"),
        Bad("a tensor", torch.tensor(3), TypeError, "Tensor"),
        *(Bad(f"{value}", value, ValueError, re.escape(str(value))) for value in (*outside, 2**70)),
    ]


def flags() -> list[Bad]:
    return [
        Bad(f"{value!r}", value, TypeError, f"{type(value).__name__}|{value!r}")
        for value in ("yes", 1, None, 0.5, [True])
    ]


def choices() -> list[Bad]:
    return [Bad(f"{value!r}", value, ValueError, re.escape(repr(value))) for value in ("another", 3, ["linear"])]


def fractions() -> list[Bad]:
    return numbers(0.0, 1.0, -0.5, 1.5)


def names() -> list[Bad]:
    return [
        Bad("text", "kl", TypeError, "str"),
        Bad("a set", {"kl"}, TypeError, "set"),
        Bad("no names", [3], TypeError, "list"),
        Bad("another", ("kl", "wasserstein"), ValueError, "'wasserstein'"),
    ]


def clamps() -> list[Bad]:
    return [
        Bad("one number", 0.5, TypeError, "0.5"),
        Bad("three numbers", (0.5, 1.0, 2.0), TypeError, "2.0"),
        Bad("text", ("low", "high"), TypeError, "low"),
        Bad("turned round", (2.0, 0.5), ValueError, r"\(2.0, 0.5\)"),
        Bad("NaN", (NAN, 1.0), ValueError, "nan"),
        Bad("infinite", (0.0, INFINITY), ValueError, "inf"),
    ]


def counts() -> list[Bad]:
    return [
        Bad("text", "many", TypeError, "str"),
        Bad("a bool", True, TypeError, "bool"),
        Bad("a list", [3], TypeError, "list"),
        *(Bad(f"{value}", value, ValueError, str(value)) for value in (-1, NAN, INFINITY)),
        *(Bad(f"a tensor of {value}", torch.tensor(value), ValueError, str(value)) for value in (-1.0, NAN, INFINITY)),
        Bad("a tensor of two", torch.ones(2), ValueError, r"\[2\]"),
        Bad("a tensor of none", torch.ones(0), ValueError, r"\[0\]"),
        Bad("a bool tensor", torch.tensor(True), ValueError, "bool"),
        Bad("a complex tensor", torch.tensor(1j), ValueError, "complex64"),
        Bad("sparse", torch.ones(1).to_sparse(), TypeError, "sparse_coo"),
        *elsewhere(torch.tensor(3.0)),
    ]


def views(logp: Tensor, counted: Tensor) -> list[Bad]:
    """What is wrong with views, and with each field of one."""
    good = ViewTerm(logp, 0.1, "k3", counted)
    fields = {"logp": floating(logp), "mask": mask(counted), "coef": numbers(), "estimator": choices()}
    return [
        Bad("one view", good, TypeError, r"ViewTerm; use views=\[view\]"),
        Bad("text", "1", TypeError, "str"),
        Bad("a dict", {"logp": logp}, TypeError, "dict"),
        Bad("log-probs", [logp], TypeError, r"views\[0\] .*Tensor; use ViewTerm\(logp, coef\)"),
        Bad("a tuple of its fields", (good, tuple(good)), TypeError, r"views\[1\] must be a ViewTerm, got tuple"),
        *(
            Bad(f"{name} is {bad.why}", [good, good._replace(**{name: bad.value})], bad.error, says)
            for name, values in fields.items()
            for bad in values
            for says in (rf"views\[1\]\.{name} .*({bad.says})",)
        ),
    ]


def settings() -> list[Bad]:
    return [
        Bad(f"{value!r}", value, TypeError, type(value).__name__) for value in ("paper", None, {}, PolicyLossOptions())
    ]


# ---- the settings ------------------------------------------------------------------------------------------------

CONFIG_VALUES: dict[str, list[Bad]] = {
    "beta": numbers(-0.1),
    "tail_ratio": numbers(-0.1, 1.5),
    "top_ratio": numbers(0.0, -0.1, 1.5),
    "schedule": choices(),
    "start_ratio": numbers(-0.1, 1.0),
    "exponent": numbers(0.0, -2.0),
    "step_ratio": numbers(-0.1, 1.5),
    "gate": flags(),
    "intra": flags(),
    "inter": flags(),
    "score": choices(),
    "score_offset": [*numbers(), Bad("without its score", 0.25, ValueError, "score_offset=0.25 needs score='offset'")],
    "position": choices(),
    "accumulation": choices(),
    "intra_clamp": clamps(),
    "inter_clamp": clamps(),
}
SHAPING_VALUES: dict[str, list[Bad]] = {
    **{name: flags() for name in ("log1p", "times_entropy", "conserve")},
    **{name: choices() for name in ("fusion", "weight", "scope", "response", "response_scope", "response_on")},
    "schedule": choices(),
    **{name: numbers(-0.1, 1.5) for name in ("fusion_weight", "share", "response_floor", "response_scale")},
    **{name: numbers(0.0, -1.0) for name in ("range_floor", "temperature", "response_temperature")},
    **{name: numbers(-0.1) for name in ("entropy_gate", "boost", "floor")},
    **{name: numbers(-0.1) for name in ("visual_weight", "entropy_weight", "other_weight")},
    "threshold": fractions(),
    **{name: numbers(0.0, -0.1, 1.5) for name in ("top_visual", "top_entropy")},
}
OPTION_VALUES: dict[str, list[Bad]] = {
    "loss_type": choices(),
    "aggregation": choices(),
    "epsilon_low": numbers(-0.1),
    "epsilon_high": numbers(-0.1),
    "dual_clip": numbers(0.5, 1.0, -3.0),
    "kl_coef": numbers(),
    "kl_estimator": choices(),
    "entropy_coef": numbers(),
    "max_length": numbers(0, -4),
    "sapo_temperature_positive": numbers(0.0, -1.0),
    "sapo_temperature_negative": numbers(0.0, -1.0),
    "vespo_k_pos": numbers(-0.5),
    "vespo_lambda_pos": numbers(-0.5),
    "vespo_k_neg": numbers(-0.5),
    "vespo_lambda_neg": numbers(-0.5),
    "ratio_clamp": numbers(0.0, -20.0),
    "cispo_cap": numbers(0.0, -1.0),
    "kl_bias_correction": flags(),
    "importance_cap": numbers(0.0, -1.0),
    "importance_mode": choices(),
}


# ---- the functions -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A public function, arguments that it accepts, and values that it must refuse in the place of one of them."""

    function: Callable[..., Any]
    good: dict[str, Any]
    bad: dict[str, list[Bad]] = field(default_factory=dict)

    def refusals(self) -> dict[str, list[Bad]]:
        """Return the values to refuse, with ``None`` where the signature does not offer it."""
        offered = inspect.signature(self.function).parameters
        return {
            name: [
                *values,
                *([] if _may_be_none(offered.get(name)) else [Bad("None", None, (TypeError, ValueError), "None")]),
            ]
            for name, values in self.bad.items()
        }

    def arguments(self) -> set[str]:
        """Return the names of all arguments, with what ``**options`` stands for."""
        parameters = inspect.signature(self.function).parameters
        names = {name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
        if len(names) == len(parameters):
            return names
        if self.function in (VGPOConfig.paper, VGPOConfig.released):
            return {setting.name for setting in fields(VGPOConfig)}
        keywords = inspect.signature(policy_ops.policy_loss).parameters.values()
        names |= {keyword.name for keyword in keywords if keyword.kind is keyword.KEYWORD_ONLY} - {"factors"}
        names |= set(PolicyLossOptions.kinds)
        return names - ({"entropy", "views"} if "targets" in names else set())


def _may_be_none(parameter: inspect.Parameter | None) -> bool:
    """Whether an argument may be ``None``; settings say so themselves, and are not asked."""
    return parameter is None or "None" in str(parameter.annotation)


def without(values: list[Bad], *legal: str) -> list[Bad]:
    """Leave out values that are no mistake in a certain place."""
    assert set(legal) <= {value.why for value in values}
    return [value for value in values if value.why not in legal]


KINDS: dict[str, Callable[[Tensor], list[Bad]]] = {
    **dict.fromkeys(("hidden", "logp", "old_logp", "ref_logp", "entropy", "advantages"), floating),
    **dict.fromkeys(
        ("importance_weights", "token_weights", "factors", "cos", "psi", "phi", "score", "prototype", "signals"),
        floating,
    ),
    **dict.fromkeys(("weight", "model_or_head", "bias", "q", "k", "slices"), floating),
    **dict.fromkeys(("other", "other_weight", "other_bias", "totals"), floating),
    **dict.fromkeys(("visual_mask", "response_mask", "prompt_mask", "has_visual", "weighted", "selected"), mask),
    **dict.fromkeys(("key_mask", "query_mask", "attention_mask"), mask),
    **dict.fromkeys(("group_ids", "prototype_index", "targets", "ids", "key_segments", "query_positions"), integers),
    **dict.fromkeys(("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k"), boundaries),
}
OTHERS: dict[str, list[Bad]] = {
    **OPTION_VALUES,
    "config": settings(),
    "num_tokens": counts(),
    "num_sequences": counts(),
    "num_selected": counts(),
    "num_segments": whole_numbers(0, -1, 2**31),
    "segment": [*whole_numbers(-1), Bad("none", (), ValueError, "segment must be")],
    "scale": numbers(),
    "window": whole_numbers(0, -3),
    "per_head": flags(),
    "return_entropy": flags(),
    "return_sum_squares": flags(),
    "top_k": whole_numbers(0, -1),
    "top_p": numbers(0.0, -0.1, 1.5),
    "min_p": numbers(-0.1, 1.5),
    "temperature": temperatures(),
    "logit_scale": numbers(0.0, -1.0),
    "softcap": numbers(0.0, -1.0),
    "ignore_index": whole_numbers(-(2**70)),
    "recompute": [value for value in flags() if value.value is not None],
    "measures": names(),
    "js_beta": fractions(),
    "progress": numbers(-0.5, 1.5),
    "chunk_bytes": whole_numbers(0, -1),
    "first": whole_numbers(-1),
    "visibility": choices(),
    "pooling": choices(),
    "samples": whole_numbers(0, -1),
    "raises": flags(),
}


def subject(function: Callable[..., Any], good: dict[str, Any], **changes: list[Bad]) -> Subject:
    """Fill in what is wrong for every argument by its name and its good value."""
    made = Subject(function, good)
    bad = {
        name: OTHERS[name] if name in OTHERS else KINDS[name](good[name])
        for name in sorted(made.arguments() & _known(good))
    }
    return Subject(function, good, bad | changes)


def _known(good: dict[str, Any]) -> set[str]:
    return set(OTHERS) | {name for name, value in good.items() if isinstance(value, Tensor)}


def subjects() -> dict[str, Subject]:
    """Return every public function, in both layouts where it has two."""
    found: dict[str, Subject] = {}
    for layout in ("padded", "packed"):
        found |= {f"{name}, {layout}": made for name, made in _batch_subjects(layout == "packed").items()}
        found |= {f"{name}, {layout}": made for name, made in _attention_subjects(layout == "packed").items()}
    return found | _head_subjects() | _setting_subjects()


RESPONSES = tuple(Response(visual=4, length=5 + 2 * index, group=index // 2) for index in range(4))


def _batch_subjects(packed: bool) -> dict[str, Subject]:
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    batch, head = with_predicting_rows(make_batch(RESPONSES, features=8, packed=packed), VOCABULARY)
    head = replace(head, targets=head.targets.clamp(min=0))
    hidden, responses = batch.hidden, batch.response_mask
    layout = {"cu_seqlens": batch.cu_seqlens} if packed else {}
    image = {"hidden": hidden, "visual_mask": batch.visual_mask}
    shared = {"prototype": uniform(3, 8), "prototype_index": torch.tensor([0, 2, -1, 1])}
    groups = {"group_ids": batch.group_ids, "config": VGPOConfig.paper()}
    shaping = {"group_ids": batch.group_ids, "config": ShapingConfig.vppo(response_scope="group", schedule="linear")}
    policy = {
        "advantages": batch.advantages,
        "ref_logp": batch.ref_logp,
        "importance_weights": uniform(4),
        "num_tokens": 30,
        "num_sequences": 4,
        "max_length": 16,
    }
    chosen = {"token_weights": uniform(4), "selected": responses, "num_selected": 10}
    sampled = {"logp": batch.logp, "old_logp": batch.old_logp, "entropy": batch.entropy}
    projected = {"weight": head.weight, "bias": head.bias, "targets": head.targets, "old_logp": batch.old_logp}
    response = {"response_mask": responses}
    factors = {"factors": uniform(*responses.shape)}

    # What is another batch, and no mistake; what it does not fit to is found by the argument that comes after.
    fewer_features = without(KINDS["hidden"](hidden), *_dimensions(hidden, -1))
    fewer_rows = KINDS["response_mask"](responses)
    if not packed:
        fewer_rows = without(fewer_rows, *_dimensions(responses, -1))
    any_prototype = KINDS["prototype"](shared["prototype"])
    outside = [
        Bad(f"{value}", torch.tensor([0, value, -1, 1]), ValueError, re.escape(f"[0, {value}, -1, 1]"))
        for value in (3, -2)
    ]
    indices = [*KINDS["prototype_index"](shared["prototype_index"]), *outside]
    shares = {"prototype": any_prototype, "prototype_index": indices}
    of_views = {"views": views(batch.ref_logp, responses)}
    # Without them vgpo_loss goes through its own kernel.
    of_chosen = {name: KINDS[name](chosen[name]) for name in ("token_weights", "selected")}
    of_chosen["num_selected"] = [Bad("without selected", 10, ValueError, "selected, which is None")]
    unpredicted = responses.clone()
    unpredicted.view(-1)[0] = True
    first_rows = {"response_mask": [*KINDS["response_mask"](responses)]}
    if packed:
        first_rows["response_mask"].append(Bad("at a first token", unpredicted, ValueError, "True at 1 of them"))
    ids = {"targets": [*KINDS["targets"](head.targets), *_outside_vocabulary(head.targets, responses)]}
    # As long as there are rows for all tokens, fewer are another batch.
    states = KINDS["hidden"](hidden)
    shorter = {"hidden": states if packed else without(states, f"{hidden.shape[1] - 1} of dimension 1")}
    both = image | response | layout | shared
    first_batch = image | response | layout | {"group_ids": batch.group_ids, "advantages": batch.advantages}
    first_batch |= {"model_or_head": head.weight, "bias": head.bias, "ids": head.targets}
    first_batch |= {"prompt_mask": batch.visual_mask, "logp": batch.logp, "old_logp": batch.old_logp}
    fewer_positions = fewer_features if packed else without(fewer_features, *_dimensions(hidden, 1))
    return {
        "check_batch": subject(vgpo_kernels.check_batch, first_batch, hidden=fewer_positions, response_mask=fewer_rows),
        "visual_prototype": subject(vgpo_kernels.visual_prototype, image | layout, hidden=fewer_features),
        "visual_focus": subject(vgpo_kernels.visual_focus, both, response_mask=fewer_rows, **shares),
        "visual_weights": subject(
            vgpo_kernels.visual_weights,
            {"cos": uniform(*responses.shape), "has_visual": batch.has_visual} | response | groups | layout,
        ),
        "group_weights": subject(
            vgpo_kernels.group_weights, {"score": uniform(4), "has_visual": batch.has_visual} | groups
        ),
        "shape_tokens": subject(
            vgpo_kernels.shape_tokens,
            {"signals": uniform(*responses.shape), "has_visual": batch.has_visual, "progress": 0.5}
            | response
            | shaping
            | layout,
        ),
        "response_factors": subject(vgpo_kernels.response_factors, {"score": uniform(4), "progress": 0.5} | shaping),
        "combine_factors": subject(
            vgpo_kernels.combine_factors,
            {"psi": uniform(*responses.shape) - 0.5, "phi": uniform(4) - 0.5, "weighted": batch.has_visual}
            | response
            | {"config": VGPOConfig.paper()}
            | layout,
        ),
        "policy_loss": subject(
            vgpo_kernels.policy_loss, sampled | policy | chosen | response | factors | layout, **of_views
        ),
        "vgpo_loss": subject(
            vgpo_kernels.vgpo_loss, both | sampled | policy | groups, **(shares | of_views | of_chosen)
        ),
        "linear_policy_loss": subject(
            vgpo_kernels.linear_policy_loss,
            {"hidden": hidden} | projected | policy | chosen | response | factors | layout,
            **(ids | first_rows | shorter),
        ),
        "linear_vgpo_loss": subject(
            vgpo_kernels.linear_vgpo_loss, both | projected | policy | groups, **(shares | ids | first_rows | of_chosen)
        ),
    }


def _dimensions(tensor: Tensor, dim: int) -> tuple[str, ...]:
    """Return the names that of_another_shape gives to other lengths of one dimension."""
    length = tensor.shape[dim]
    return tuple(f"{size} of dimension {dim % tensor.dim()}" for size in {1, length - 1} if size < length)


def _outside_vocabulary(good: Tensor, read: Tensor) -> list[Bad]:
    place = tuple(int(index) for index in read.nonzero()[1])
    found = []
    for value in (-1, VOCABULARY, 2**40):
        wrong = good.clone()
        wrong[place] = value
        found.append(Bad(f"{value} of {VOCABULARY}", wrong, ValueError, str(value)))
    return found


def _attention_subjects(packed: bool) -> dict[str, Subject]:
    lengths = ((3, 9), (2, 4), (1, 5)) if packed else ((3, 9), (3, 9), (3, 9))
    case = draw(lengths, size=8, packed=packed)
    q, k, segments = case.q, case.k, case.segments
    positions = torch.full(q.shape[::2] if q.dim() == 4 else q.shape[:1], 2)
    layout = {"cu_seqlens_q": case.cu_seqlens_q, "cu_seqlens_k": case.cu_seqlens_k} if packed else {}
    both = {"q": q, "k": k, "query_positions": positions} | layout
    # Fewer keys than a query sits at are no mistake: it sees them all.
    beyond = [Bad("not below num_segments", segments + 1, ValueError, "num_segments=3.*got 3")]
    # All query heads may share one.
    narrow = {"k": without(KINDS["k"](k), "1 of dimension 1")}
    narrow["k"] += [
        Bad("another dtype than q", k.bfloat16(), TypeError, "bfloat16"),
        Bad("heads that do not divide q's", torch.cat([k, k], dim=1), ValueError, "6 heads.* and 4"),
    ]
    few = [*OTHERS["num_segments"], Bad("fewer than there are", 2, ValueError, "num_segments=2")]
    narrow["q"] = [*KINDS["q"](q), Bad("heads that k's do not divide", q[:, :3], ValueError, "3 heads.* and 2")]
    return {
        "attention_mass": subject(
            vgpo_kernels.attention_mass,
            both | {"key_segments": segments},
            key_segments=[*KINDS["key_segments"](segments), *beyond],
            num_segments=few,
            **narrow,
        ),
        "attention_heatmap": subject(
            vgpo_kernels.attention_heatmap,
            both | {"key_mask": segments == 1, "query_mask": positions > 0, "attention_mask": segments >= 0},
            **narrow,
        ),
        "attention_shift": subject(vgpo_kernels.attention_shift, both | {"key_segments": segments}, **narrow),
    }


def _head_subjects() -> dict[str, Subject]:
    rows, features = 6, 8
    generator = torch.Generator().manual_seed(0)
    head = {
        "hidden": torch.randn(rows, features, generator=generator),
        "weight": torch.randn(VOCABULARY, features, generator=generator),
        "bias": torch.randn(VOCABULARY, generator=generator),
        "targets": torch.randint(VOCABULARY, (rows,), generator=generator),
    }
    ids = KINDS["targets"](head["targets"])
    everywhere = torch.ones(rows, dtype=torch.bool)
    outside = _outside_vocabulary(head["targets"], everywhere)
    negative = [value for value in outside if value.why.startswith("-1")]
    views = head | {
        "other": torch.randn(rows, features - 3, generator=generator),
        "other_weight": torch.randn(VOCABULARY, features - 3, generator=generator),
        "other_bias": torch.randn(VOCABULARY, generator=generator),
    }
    totals = {"totals": torch.rand(4, rows, generator=generator)}
    of_views = {"slices": torch.randn(2, 15, rows, generator=generator)}
    any_number = {"slices": without(KINDS["slices"](of_views["slices"]), "1 of dimension 0")}
    gathered = {"slices": torch.randn(2, 4, rows, generator=generator), "targets": head["targets"]}
    return {
        "linear_logprob": subject(vgpo_kernels.linear_logprob, head, targets=[*ids, *outside]),
        "linear_logprob_slice": subject(
            vgpo_kernels.linear_logprob_slice, head | {"first": 3}, targets=[*ids, *negative]
        ),
        "linear_divergence": subject(vgpo_kernels.linear_divergence, views, targets=[*ids, *outside]),
        "linear_divergence_slice": subject(
            vgpo_kernels.linear_divergence_slice, views | totals | {"first": 3}, targets=[*ids, *negative]
        ),
        "combine_divergences": subject(
            vgpo_kernels.combine_divergences, of_views | {"targets": head["targets"]}, **any_number
        ),
        "divergence_totals": subject(
            vgpo_kernels.divergence_totals,
            of_views,
            slices=without(any_number["slices"], "1 of dimension 2", f"{rows - 1} of dimension 2", "on another device"),
        ),
        "combine_slices": subject(
            vgpo_kernels.combine_slices,
            gathered,
            slices=without(KINDS["slices"](gathered["slices"]), "1 of dimension 0"),
        ),
    }


def _setting_subjects() -> dict[str, Subject]:
    return {
        "VGPOConfig": Subject(VGPOConfig, {}, CONFIG_VALUES),
        "VGPOConfig.paper": Subject(VGPOConfig.paper, {}, CONFIG_VALUES),
        "VGPOConfig.released": Subject(
            VGPOConfig.released,
            {},
            CONFIG_VALUES | {"score_offset": without(CONFIG_VALUES["score_offset"], "without its score")},
        ),
        "ShapingConfig": Subject(ShapingConfig, {}, SHAPING_VALUES),
        "PolicyLossOptions": Subject(PolicyLossOptions, {}, OPTION_VALUES),
        "backend": Subject(_enter_backend, {"name": "reference"}, {"name": choices()}),
    }


def _enter_backend(name: str) -> None:
    with vgpo_kernels.backend(name):
        pass
