"""What was probably meant: the end of an error message that answers a likely slip. Text is made only to be raised.

Nothing is imported of this package, so that every module can ask. A hint is empty where nothing is likely.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from typing import Any, ParamSpec, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")

# ---- names ---------------------------------------------------------------------------------------------------------

# What others call an argument or an option: TRL, verl, EasyR1, OpenRLHF, Liger, transformers, and people.
_OURS: dict[str, tuple[str, ...]] = {
    "epsilon_low": ("clip_ratio_low", "cliprange_low", "clip_eps_low"),
    "epsilon_high": ("clip_ratio_high", "cliprange_high", "clip_eps_high"),
    "epsilon_low and epsilon_high": (
        "epsilon",
        "clip_ratio",
        "cliprange",
        "clip_range",
        "clip_eps",
        "eps",
        "eps_clip",
        "eps_clip_low_high",
    ),
    "dual_clip": ("delta", "clip_ratio_c", "clip_ratio_dual"),
    "kl_coef": ("beta", "kl_beta", "kl_loss_coef", "init_kl_coef", "kl_ctl"),
    "kl_estimator": ("kl_loss_type", "kl_penalty"),
    "kl_bias_correction": ("use_bias_correction_kl",),
    "entropy_coef": ("entropy_coeff", "entropy_loss_coef"),
    "aggregation": ("loss_agg_mode", "loss_avg_mode", "token_level_loss"),
    "loss_type": ("loss_mode", "policy_loss_type", "importance_sampling_level"),
    "max_length": ("max_completion_length", "loss_scale_factor"),
    "num_tokens": ("num_items_in_batch", "batch_num_tokens"),
    "num_sequences": ("global_batch_size",),
    "sapo_temperature_positive": ("sapo_temperature_pos", "tau_pos", "tau_positive"),
    "sapo_temperature_negative": ("sapo_temperature_neg", "tau_neg", "tau_negative"),
    "importance_cap": ("vllm_importance_sampling_cap", "vllm_importance_sampling_clip_max"),
    "importance_mode": ("vllm_importance_sampling_mode",),
    "importance_weights": ("rollout_is_weights", "importance_sampling_ratio", "vllm_is_ratio"),
    "response_mask": ("mask", "attention_mask", "completion_mask", "action_mask", "loss_mask"),
    "visual_mask": ("image_mask", "vision_mask", "image_token_mask", "mm_token_type_ids"),
    "logp": ("log_prob", "log_probs", "logprobs", "logps", "per_token_logps"),
    "old_logp": ("old_log_prob", "old_log_probs", "old_logprobs", "old_logps", "old_per_token_logps"),
    "ref_logp": ("ref_log_prob", "ref_log_probs", "ref_logprobs", "ref_logps", "ref_per_token_logps"),
    "model_or_head": ("model", "head", "policy"),
    "factors": ("factor",),
    "hidden": ("hidden_states", "last_hidden_state", "_input"),
    "weight": ("lm_head", "lin_weight"),
    "targets": ("labels", "input_ids", "selected_token_ids", "completion_ids", "responses"),
    "group_ids": ("uid", "uids", "index"),
    "cu_seqlens": ("cu_seq_lens", "cu_seqlens_q", "cu_seq_lens_q"),
    # Fields of VGPOConfig: the paper's letters.
    "tail_ratio": ("gamma",),
    "top_ratio": ("kappa",),
    # Fields of ShapingConfig: the options of the methods' released code.
    "top_visual": ("top_p_perception_tokens", "top_perception_quantile", "jsd_mask_top_p", "high_fraction"),
    "top_entropy": ("top_p_entropy_tokens", "top_entropy_quantile"),
    "fusion_weight": ("jsd_mask_alpha",),
    "entropy_gate": ("gate_alpha", "pepo_gate_alpha"),
    "temperature": ("gate_temperature", "pepo_gate_temperature"),
    "share": ("high_weight",),
    "response_floor": ("advantage_scaling_min", "vppo_response_scaling_min"),
    "response_scale": ("cgpo_response_scaling_coef",),
}
ALIASES = {theirs: ours.split(" and ") for ours, names in _OURS.items() for theirs in names}

# The names of the authors' training script for what VGPOConfig calls otherwise.
AUTHORS_NAMES = {
    "use_intra_trajectory_reweighting": "intra",
    "use_inter_trajectory_reweighting": "inter",
    "visual_compensation_type": "schedule",
    "visual_compensation_strength": "beta",
    "visual_compensation_start_ratio": "start_ratio",
    "visual_compensation_exponent": "exponent",
    "visual_compensation_step_ratio": "step_ratio",
    "use_gated_visual_compensation": "gate",
    "gated_visual_compensation_start_ratio": "tail_ratio",
    "visual_attention_threshold": "top_ratio",
}

# Arguments of the losses that some of them do not take, or that have their place elsewhere.
_OF_HEADS = "is an argument of linear_policy_loss and linear_vgpo_loss, which compute the log-probs themselves"
_OF_FOCUS = "is an argument of vgpo_loss and linear_vgpo_loss, which compute the factors themselves"
MISPLACED = {
    "beta": "TRL's weight of the KL term is kl_coef; VGPO's beta is a field of VGPOConfig",
    "temperature": f"temperature {_OF_HEADS}: log-probs that are given have to be of logits divided by it",
    "logits": "log-probs are expected, of linear_policy_loss and linear_vgpo_loss hidden states and the head",
    "rewards": "advantages are expected, such as rewards less the mean of their group",
    "factors": "vgpo_loss and linear_vgpo_loss compute them themselves; policy_loss and linear_policy_loss take them",
    "entropy": "linear_policy_loss and linear_vgpo_loss compute entropies themselves: entropy_coef is enough",
    "views": "a view is compared with log-probs that are given: hand those of linear_logprob to policy_loss(views=...)",
    "config": "the settings of VGPO go to visual_weights, whose factors policy_loss takes, or to vgpo_loss",
    "options": "options are keywords each: policy_loss(..., **options)",
    "pooling": "pooling is an argument of visual_focus, whose cosines visual_weights makes factors of",
}
_HEADS = ("hidden", "weight", "bias", "targets", "logit_scale", "softcap", "chunk_bytes", "recompute")
MISPLACED |= {name: f"{name} {_OF_HEADS}" for name in _HEADS}
_FOCUS = ("visual_mask", "group_ids", "prototype", "prototype_index", "visibility")
MISPLACED |= {name: f"{name} {_OF_FOCUS}" for name in _FOCUS}
# What losses take besides their options.
LOSS_ARGUMENTS = (
    *("logp", "old_logp", "advantages", "response_mask", "factors", "cu_seqlens", "ref_logp", "entropy"),
    *("importance_weights", "token_weights", "selected", "num_tokens", "num_sequences", "num_selected", "views"),
)


def name_meant(name: str, known: Collection[str]) -> str:
    """Say which of the ``known`` names an unknown one was probably meant to be."""
    ours = AUTHORS_NAMES.get(name) or name.removeprefix("vgpo_")
    meant = [ours] if ours in known else [one for one in ALIASES.get(name, ()) if one in known]
    meant = meant or get_close_matches(name, known, n=1, cutoff=0.7)
    if name in AUTHORS_NAMES and meant:
        return f"did you mean {ours}? authors_config of vgpo_kernels.integrations.easyr1 reads the script's own names"
    return f"did you mean {' and '.join(meant)}?" if meant else ""


def explained(function: Callable[P, R], meant: Callable[[str], str] | None = None, called: str = "") -> Callable[P, R]:
    """Let a call that does not fit the function's signature raise a TypeError that says what was probably meant.

    Args:
        function: Any function. What it raises itself is left as it is.
        meant: What an unknown keyword was meant to be, in words, where its likeness to others does not say so.
        called: What messages call the function; by default its name.

    """

    @wraps(function)
    def call(*given: P.args, **named: P.kwargs) -> R:
        if torch.compiler.is_compiling():  # nothing to trace but the function
            return function(*given, **named)
        try:
            return function(*given, **named)
        except TypeError as error:
            if error.__traceback__ is None or error.__traceback__.tb_next is not None:
                raise
            raise TypeError(_misfit(function, called, given, named, meant, str(error))) from None

    return call


def _misfit(
    function: Callable[..., Any],
    called: str,
    given: Sequence[object],
    named: Mapping[str, object],
    meant: Callable[[str], str] | None,
    said: str,
) -> str:
    """Say how a call does not fit a signature, by what Python ``said`` where that will do."""
    parameters = inspect.signature(function).parameters
    called = called or function.__qualname__.removesuffix(".__init__")
    has_options = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    for name in [name for name in named if name not in parameters]:
        hint = (meant(name) if meant else "") or _field_meant(function, name) or name_meant(name, parameters)
        if has_options:  # what it takes by any name is no slip, unless it stands for what is missing
            absent = parameters.keys() - named.keys()
            hint = name_meant(name, absent) if absent & set(ALIASES.get(name, ())) else ""
            if not hint:
                continue
        names = ", ".join(one for one in parameters if one not in ("self", "cls"))
        return f"{called} has no '{name}': {hint or f'its arguments are {names}'}"
    placed = [name for name, one in parameters.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
    own = [name for name in placed if name not in ("self", "cls")]
    if len(given) <= len(placed):
        if not said.endswith("'config'"):
            return said
        of_methods = any(hasattr(kind, "preset") for kind in _kinds_of_config(function))
        return f"{said}; {_A_METHODS}" if of_methods else f"{said}; the paper's is VGPOConfig.paper()"
    if isinstance(given[len(placed)], Mapping):
        return f"{called} takes no dict by place: hand its entries over by **"
    by_name = [name for name, one in parameters.items() if one.kind is one.KEYWORD_ONLY]
    rest = "the rest by name" if by_name or has_options else "no more"
    rest += f", such as {by_name[0]}=..." if by_name else ""
    number = len(given) - len(placed) + len(own)
    return f"{called} takes {', '.join(own) or 'nothing'} by place and {rest}, got {number} by place"


def _field_meant(function: Callable[..., Any], name: str) -> str:
    """Say that a name is a field of the function's ``config``."""
    field = AUTHORS_NAMES.get(name) or name.removeprefix("vgpo_")
    for kind in _kinds_of_config(function):
        if field in getattr(kind, "kinds", ()):
            made = f"{kind.__name__}.paper" if hasattr(kind, "paper") else kind.__name__
            return f"{field} is a field of its config, {made}({field}=...)"
    return ""


def _kinds_of_config(function: Callable[..., Any]) -> tuple[Any, ...]:
    """Return the classes of settings that a function takes for its ``config``."""
    kind = get_type_hints(function).get("config")
    return get_args(kind) or (kind,)


# ---- values --------------------------------------------------------------------------------------------------------

LOG_PROBS = ("logp", "old_logp", "ref_logp")
STATES = ("hidden", "other")
OF_RESPONSES = ("group_ids", "advantages", "importance_weights", "score", "phi", "has_visual", "weighted")

_A_METHODS = "a method's are ShapingConfig.preset('vppo')"
_CALLED = "model(**inputs, output_hidden_states=True).hidden_states[-1]"
_GATHER = "logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1), of the logits one position before each id"
# Attributes of what was given whole, and what to take instead: outputs of models, of other functions, of heads.
_PARTS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (STATES, "last_hidden_state", "{}.last_hidden_state"),
    (STATES, "hidden_states", "{}.hidden_states[-1]"),
    (LOG_PROBS, "logp", "{}.logp"),
    (LOG_PROBS, "logits", f"linear_logprob of hidden states, or {_GATHER}"),
    (("weight", "other_weight"), "weight", "{}.weight"),
    (("bias", "other_bias"), "bias", "{}.bias"),
    *(((name,), name, f"{{}}.{name}") for name in ("factors", "psi", "phi", "score", "entropy", "selected")),
    (("token_weights",), "weights", "{}.weights"),
)


def not_a_tensor(name: str, value: object) -> str:
    """Say how to make a tensor of what was given in the place of one."""
    if _is_text(value):
        return f"; text becomes numbers by torch.from_numpy(numpy.unique({name}, return_inverse=True)[1])"
    if type(value).__module__ == "numpy":
        return f"; use torch.from_numpy({name})" if hasattr(value, "__len__") else f"; use torch.tensor({name})"
    for names, part, instead in _PARTS:
        if name in names and getattr(value, part, None) is not None:
            return f"; use {instead.format(name)}"
    if isinstance(value, (list, tuple)):
        return _of_sequence(name, value)
    if name in STATES and type(value).__name__ == "CapturedHiddenStates":
        return f"; use {name}.hidden"
    if getattr(value, "__name__", "") == "visual_mask" and callable(value):
        return "; call it: visual_mask(input_ids, model, response_mask)"
    if name in STATES and (isinstance(value, (nn.Module, Mapping)) or hasattr(value, "logits")):
        return f"; the last hidden states are {_CALLED}"
    if hasattr(value, "as_floats") and not isinstance(value, type):
        return f"; a {type(value).__name__} goes to config"
    if isinstance(getattr(value, "__self__", None), Tensor):
        return f"; call it: .{getattr(value, '__name__', '')}()"
    return ""


def _is_text(value: object) -> bool:
    if type(value).__module__ == "numpy":
        return getattr(getattr(value, "dtype", None), "kind", "") in ("U", "S", "O")
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(one, str) for one in value)


def _of_sequence(name: str, values: Sequence[object]) -> str:
    tensors = [one for one in values if isinstance(one, Tensor)]
    if tensors and len(tensors) == len(values):
        if name in STATES:
            return f"; of the layers that output_hidden_states=True returns, take {name}[-1]"
        if len({one.shape for one in tensors}) == 1:
            return f"; use torch.stack({name})"
        return f"; use torch.nn.utils.rnn.pad_sequence({name}, batch_first=True)"
    if len({len(one) if isinstance(one, (list, tuple)) else 0 for one in values}) > 1:
        return "; pad its rows to one length, then use torch.tensor"
    return f"; use torch.tensor({name})"


def not_floating(name: str, tensor: Tensor) -> str:
    """Say what to do with a tensor of integers or bools where log-probs, states or weights are expected."""
    if tensor.is_complex():
        return ""
    if name in (*STATES, *LOG_PROBS) and tensor.dtype != torch.bool:
        return f"; ids? {'hidden states' if name in STATES else 'log-probs'} are expected"
    return f"; use {name}.float()"


def settings(name: str, value: object, kind: type) -> str:
    """Say how to make settings of the class ``kind`` of what was given in the place of them."""
    called = kind.__name__
    of_methods = hasattr(kind, "preset")
    if value is None:
        return f"; {_A_METHODS}" if of_methods else f"; the paper's are {called}.paper()"
    if isinstance(value, str):
        presets = f"{called}.preset({name})" if of_methods else f"{called}.paper() or {called}.released()"
        return f"; use {called}.{value}()" if hasattr(kind, value) else f"; use {presets}"
    if isinstance(value, Mapping):
        if value.keys() & AUTHORS_NAMES.keys():
            return f"; use vgpo_kernels.integrations.easyr1.authors_config({name})"
        return f"; use {called}(**{name})"
    if value is kind:
        return f"; use {called}()"
    if getattr(value, "__self__", None) is kind:
        return f"; call it: {called}.{getattr(value, '__name__', '')}()"
    if hasattr(value, "vgpo_config"):
        return f"; use {name}.vgpo_config()"
    if hasattr(value, "preset"):
        return f"; shape_tokens takes a {type(value).__name__}"
    return "; options of the loss are keywords of their own" if hasattr(value, "as_floats") else ""


def number(value: object) -> str:
    """Say what to do where a field of settings, the first by place, got all of them."""
    if isinstance(value, Mapping):
        return "; hand a dict of fields over by **"
    return f"; use VGPOConfig.{value}()" if isinstance(value, str) and value in ("paper", "released") else ""


def choice(value: object, choices: Sequence[str]) -> str:
    """Say which of the choices another name of it means: verl's, or one spelled otherwise."""
    if not isinstance(value, str):
        return ""
    meant = _CHOICES.get(value)
    close = [meant] if meant in choices else get_close_matches(value.lower(), choices, n=1, cutoff=0.8)
    return f"; did you mean '{close[0]}'?" if close else ""


# verl's estimators of the KL divergence and its plain loss, and the schedule of the authors' script.
_CHOICES = {"low_var_kl": "k3_clamped", "kl": "k1", "mse": "k2", "vanilla": "grpo", "ppo": "grpo"}
_CHOICES |= {"step-function": "step"}


# ---- shapes --------------------------------------------------------------------------------------------------------


def shape(name: str, got: Sequence[int], expected: Sequence[int], like: str = "") -> str:
    """Say how to fit a shape to the expected one, which is that of the argument ``like``, if of any."""
    got, expected = tuple(got), tuple(expected)
    if len(got) == len(expected) + 1:
        if got == (*expected, 1):
            return f"; use {name}.squeeze(-1)"
        if got == (1, *expected):
            return f"; use {name}.squeeze(0)"
        if name in LOG_PROBS and got[:1] == expected[:1]:
            return f"; logits? Log-probs are {_GATHER}; or use linear_logprob"
        if expected and got[0] == expected[0] and name in OF_RESPONSES:
            one = f"{name}.any(-1)" if name in ("has_visual", "weighted") else f"{name}[:, 0] where a row is all equal"
            return f"; one a response is expected, such as {one}"
    if got == expected[::-1]:
        return f"; use {name}.T"
    if (
        name in OF_RESPONSES
        and len(got) == len(expected) == 1
        and 0 < got[0] < expected[0]
        and not expected[0] % got[0]
    ):
        times = expected[0] // got[0]
        repeated = f"{name}.repeat_interleave({times}, dim=0) where its responses are next to each other"
        return f"; one a prompt? Repeat them: {repeated}, {name}.repeat({times}) where prompts alternate"
    if len(expected) == 2 and like == "response_mask":
        return _positions(name, got, expected)
    if len(got) == len(expected) == 2 and got[0] == expected[0] and like == "hidden":
        return _of_states(name, got[1], expected[1] - got[1])
    if len(got) == 2 and len(expected) == 1 and like == "response_mask":
        return f"; response_mask is packed, so {name} has to be: {name}[attention_mask.bool()] has the tokens alone"
    return ""


def _of_states(name: str, got: int, missing: int) -> str:
    """Say how to fit one number a token, of ``got`` positions, to states that have ``missing`` more."""
    if name == "targets":
        if missing < 0:
            return "; if hidden lacks the last position, it predicts targets[:, 1:]" if missing == -1 else ""
        return f"; if these are the last ids, the states before them are hidden[:, {-got - 1}:-1]"
    if missing < 0:
        return "; hidden has to cover prompt and response as it does"
    return (
        "; it has to cover prompt and response (is it swapped with response_mask?), a prompt's does by "
        f"torch.nn.functional.pad({name}, (0, {missing}))"
    )


def _positions(name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Say how to fit one number a token to a padded response_mask."""
    if len(got) == 1:
        if got[0] == expected[1]:
            return "; is response_mask [T, B]? Use response_mask.T"
        if got[0] == expected[0]:
            return f"; one a response is {name}[:, None].expand(-1, {expected[1]})"
        return "; a packed batch needs cu_seqlens and a packed response_mask [N]"
    if len(got) != 2 or got[0] != expected[0]:
        return ""
    if got[1] == expected[1] + 1 and name in (*LOG_PROBS, "entropy"):
        # Which end is to be cut is not known: the row after the last token, or the one too early.
        return f"; those of the last {expected[1]} tokens are of logits[:, -{got[1]}:-1], one row before each"
    if got[1] > expected[1]:
        return f"; cut it to the last {expected[1]} positions, those of response_mask: {name}[:, -{expected[1]}:]"
    return (
        f"; if response_mask covers what comes before, cut it to the last {got[1]} positions, those of {name}: "
        f"response_mask[:, -{got[1]}:]"
    )


def response_mask(got: Sequence[int], floating: bool, packed: bool) -> str:
    """Say how to make a mask ``[B, T]`` or, packed, ``[N]`` of one with another number of dimensions."""
    if floating and len(got) == 1:
        return "; advantages come before response_mask"
    if packed:
        return "; use response_mask.squeeze(0)" if tuple(got[:-1]) == (1,) else "; a padded batch takes no cu_seqlens"
    if len(got) == 1:
        return "; use response_mask[None] for one sequence, or give cu_seqlens for a packed batch"
    return "; use response_mask.squeeze(-1)" if got and got[-1] == 1 else ""


def hidden(got: Sequence[int], packed: bool) -> str:
    """Say how to make states ``[B, S, D]`` or, packed, ``[N, D]`` of some with another number of dimensions."""
    if packed:
        return "; use hidden.squeeze(0)" if len(got) == 3 and got[0] == 1 else "; a padded batch takes no cu_seqlens"
    if len(got) == 2:
        return "; use hidden[None] for one sequence, or give cu_seqlens for a packed batch"
    return "; of stacked layers take hidden[-1], the last" if len(got) == 4 else ""


def last_positions(got: Sequence[int], of: Sequence[int], name: str) -> str:
    """Say how to fit a mask to the last positions of states or ids ``[B, S, ...]``."""
    if len(got) == 2 and got[0] == of[0]:
        return f"; {name} has to cover the prompt, too" if got[1] > of[1] else ""
    if len(got) == 2 and got[1] == of[0] and got[0] <= of[1]:
        return "; use response_mask.T"
    return shape("response_mask", got, of[:2])
