"""What is said of a call that is nearly right: by names of other libraries, with shapes or types one step away."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import vgpo_kernels
from vgpo_kernels import PolicyLossOptions, ShapingConfig, VGPOConfig, hints, policy_loss
from vgpo_kernels.integrations import sequence_parallel, tensor_parallel

B, S, T, D, V = 4, 12, 5, 8, 7
CALLED = [value for name, value in vars(vgpo_kernels).items() if inspect.isfunction(value) and name != "backend"]
CALLED += [value for name, value in vars(tensor_parallel).items() if name.startswith("parallel_")]
CALLED += [value for name, value in vars(sequence_parallel).items() if name.startswith("parallel_")]


def arguments() -> dict[str, Any]:
    """What every function of the losses accepts, by name."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    visual = torch.zeros(B, S, dtype=torch.bool)
    visual[:, :3] = True
    return {
        "hidden": normal(B, S, D),
        "weight": normal(V, D),
        "targets": torch.randint(V, (B, T), generator=generator),
        "logp": -normal(B, T).abs(),
        "old_logp": -normal(B, T).abs(),
        "advantages": normal(B),
        "visual_mask": visual,
        "response_mask": torch.ones(B, T, dtype=torch.bool),
        "group_ids": torch.tensor([0, 0, 1, 1]),
        "config": VGPOConfig(),
        "cos": normal(B, T).clamp(-1, 1),
        "signals": normal(B, T).clamp(-1, 1),
        "score": normal(B),
        "psi": normal(B, T),
        "phi": normal(B),
    }


GOOD = arguments()


def message_of(function: Callable[..., Any], error: type[Exception], /, *given: Any, **named: Any) -> str:
    with pytest.raises(error) as caught:
        function(*given, **named)
    assert type(caught.value) is error, "no subclass: the message alone says more"
    message = str(caught.value)
    assert "\n" not in message
    return message


def changed(function: str, error: type[Exception], **changes: Any) -> str:
    """Return what a public function says of good arguments with some changed."""
    called = getattr(vgpo_kernels, function)
    taken = inspect.signature(called).parameters
    named = {name: value for name, value in GOOD.items() if name in taken} | changes
    return message_of(called, error, **named)


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [
        *((name, "did you mean epsilon_low and epsilon_high?") for name in ("epsilon", "clip_ratio", "cliprange")),
        *((name, "did you mean epsilon_low and epsilon_high?") for name in ("eps_clip", "eps_clip_low_high")),
        ("clip_ratio_low", "did you mean epsilon_low?"),
        ("clip_ratio_high", "did you mean epsilon_high?"),
        ("clip_ratio_c", "did you mean dual_clip?"),
        ("delta", "did you mean dual_clip?"),
        ("beta", "TRL's weight of the KL term is kl_coef; VGPO's beta is a field of VGPOConfig"),
        ("kl_beta", "did you mean kl_coef?"),
        ("kl_loss_coef", "did you mean kl_coef?"),
        ("kl_coeff", "did you mean kl_coef?"),
        ("entropy_coeff", "did you mean entropy_coef?"),
        ("loss_agg_mode", "did you mean aggregation?"),
        ("num_items_in_batch", "did you mean num_tokens?"),
        ("attention_mask", "did you mean response_mask?"),
        ("mask", "did you mean response_mask?"),
        ("ref_per_token_logps", "did you mean ref_logp?"),
        ("top_ratio", "top_ratio is a field of VGPOConfig"),
        ("visual_compensation_strength", "beta is a field of VGPOConfig"),
        ("options", "options are keywords each"),
        ("sapo_temprature_positive", "did you mean sapo_temperature_positive?"),
        ("nonsense", "its arguments are loss_type, aggregation, epsilon_low"),
    ],
)
def test_an_unknown_option_names_the_one_that_was_meant(name: str, says: str) -> None:
    for function in ("policy_loss", "vgpo_loss", "linear_policy_loss", "linear_vgpo_loss"):
        message = changed(function, TypeError, **{name: 0.2})
        assert f"has no '{name}': " in message and says in message, function


@pytest.mark.parametrize(
    ("function", "name", "says"),
    [
        ("policy_loss", "temperature", "log-probs that are given have to be of logits divided by it"),
        ("policy_loss", "logits", "log-probs are expected, of linear_policy_loss"),
        ("policy_loss", "rewards", "advantages are expected, such as rewards less the mean of their group"),
        ("policy_loss", "hidden", "an argument of linear_policy_loss and linear_vgpo_loss"),
        ("policy_loss", "visual_mask", "an argument of vgpo_loss and linear_vgpo_loss"),
        ("policy_loss", "config", "settings of VGPO go to visual_weights"),
        ("vgpo_loss", "factors", "compute them themselves"),
        ("vgpo_loss", "pooling", "an argument of visual_focus, whose cosines visual_weights makes factors of"),
        ("linear_vgpo_loss", "factors", "compute them themselves"),
        ("linear_policy_loss", "entropy", "compute entropies themselves: entropy_coef is enough"),
        ("visual_weights", "beta", "beta is a field of its config, VGPOConfig.paper(beta=...)"),
        ("visual_weights", "visual_compensation_strength", "beta is a field of its config"),
        ("group_weights", "vgpo_inter", "inter is a field of its config"),
        ("visual_focus", "attention_mask", "did you mean response_mask?"),
        ("visual_focus", "hidden_states", "did you mean hidden?"),
        ("visual_focus", "poolings", "did you mean pooling?"),
        ("linear_logprob", "labels", "did you mean targets?"),
        ("linear_logprob", "temprature", "did you mean temperature?"),
    ],
)
def test_an_argument_of_another_place_says_where_it_goes(function: str, name: str, says: str) -> None:
    message = changed(function, TypeError, **{name: 0.2})
    assert f"has no '{name}': " in message and says in message


@pytest.mark.parametrize("function", CALLED, ids=lambda function: function.__name__)
def test_every_function_explains_a_call_that_does_not_fit(function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters.values()
    if not any(one.kind is one.VAR_KEYWORD for one in parameters):  # else test_an_unknown_option
        named = {one.name: None for one in parameters}
        message = message_of(function, TypeError, **named, nonsense=1)
        assert message.startswith(f"{function.__name__} has no 'nonsense': its arguments are ")
    placed = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    message = message_of(function, TypeError, *[None] * (len(placed) + 1))
    assert message.startswith(f"{function.__name__} takes {', '.join(placed)} by place and ")
    assert "missing" in message_of(function, TypeError)


def test_a_name_in_the_place_of_one_that_is_missing_is_the_slip() -> None:
    batch = {name: GOOD[name] for name in ("logp", "old_logp", "advantages")}
    said = message_of(policy_loss, TypeError, **batch, mask=GOOD["response_mask"])
    assert said == "policy_loss has no 'mask': did you mean response_mask?"
    said = message_of(vgpo_kernels.visual_weights, TypeError, *(GOOD[name] for name in ("cos", "response_mask")), None)
    assert said.endswith("'config'; the paper's is VGPOConfig.paper()")


def test_an_error_of_the_function_itself_is_left_alone() -> None:
    def own(value: int, *, other: int = 0) -> int:
        raise TypeError(f"of {value} and {other}")

    assert message_of(hints.explained(own), TypeError, 1, other=2) == "of 1 and 2"
    assert inspect.signature(hints.explained(own)) == inspect.signature(own)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: VGPOConfig(betta=0.3), "VGPOConfig has no 'betta': did you mean beta?"),
        (lambda: VGPOConfig.paper(gamma=0.5), "has no 'gamma': did you mean tail_ratio?"),
        (lambda: VGPOConfig.released(kappa=0.5), "has no 'kappa': did you mean top_ratio?"),
        (lambda: VGPOConfig.paper(visual_compensation_strength=1), "did you mean beta? authors_config of "),
        (lambda: VGPOConfig.paper(vgpo_top_ratio=1), "did you mean top_ratio?"),
        (lambda: VGPOConfig.paper(nonsense=1), "its arguments are beta, tail_ratio, top_ratio, schedule"),
        (lambda: VGPOConfig.paper(0.3), "VGPOConfig.paper takes nothing by place and the rest by name, got 1 by place"),
        (lambda: VGPOConfig.paper({"beta": 1}), "hand its entries over by **"),
        (lambda: VGPOConfig({"beta": 0.3}), "got {'beta': 0.3}; hand a dict of fields over by **"),
        (lambda: VGPOConfig("paper"), "got 'paper'; use VGPOConfig.paper()"),
        (lambda: PolicyLossOptions(num_items_in_batch=1), "did you mean num_tokens?"),
    ],
)
def test_settings_say_which_field_was_meant(call: Callable[[], Any], says: str) -> None:
    assert says in message_of(call, TypeError)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kl_estimator": "low_var_kl"}, "got 'low_var_kl'; did you mean 'k3_clamped'?"),
        ({"kl_estimator": "K3"}, "did you mean 'k3'?"),
        ({"loss_type": "vanilla"}, "did you mean 'grpo'?"),
        ({"loss_type": "GSPO"}, "did you mean 'gspo'?"),
        ({"loss_type": "drgrpo"}, "did you mean 'dr_grpo'?"),
        ({"aggregation": "token_mean"}, "did you mean 'token-mean'?"),
    ],
)
def test_another_name_of_a_choice_is_told(changes: dict[str, Any], says: str) -> None:
    assert changed("policy_loss", ValueError, **changes).endswith(says)
    assert message_of(VGPOConfig, ValueError, schedule="step-function").endswith("did you mean 'step'?")
    assert message_of(VGPOConfig, ValueError, schedule="another").endswith("got 'another'")


def test_what_is_suggested_exists() -> None:
    names = set(VGPOConfig.kinds) | set(PolicyLossOptions.kinds) | set(ShapingConfig.kinds)
    for function in CALLED:
        names |= inspect.signature(function).parameters.keys()
    assert {ours for meant in hints.ALIASES.values() for ours in meant} <= names
    assert set(hints.AUTHORS_NAMES.values()) <= VGPOConfig.kinds.keys()
    taken = inspect.signature(policy_loss).parameters.keys() - {"options"}
    assert set(hints.LOSS_ARGUMENTS) == taken


@pytest.mark.parametrize(
    ("package", "file", "names"),
    [
        (
            "trl",
            "trainer/grpo_config.py",
            "epsilon beta delta importance_sampling_level max_completion_length sapo_temperature_pos "
            "use_bias_correction_kl vllm_importance_sampling_clip_max vllm_importance_sampling_mode",
        ),
        (
            "trl",
            "trainer/grpo_trainer.py",
            "num_items_in_batch completion_mask old_per_token_logps ref_per_token_logps",
        ),
        (
            "verl",
            "workers/config/actor.py",
            "clip_ratio clip_ratio_low clip_ratio_high clip_ratio_c loss_agg_mode loss_scale_factor entropy_coeff "
            "kl_loss_coef kl_loss_type tau_pos loss_mode",
        ),
        (
            "verl",
            "trainer/ppo/core_algos.py",
            "cliprange cliprange_low log_prob old_log_prob rollout_is_weights batch_num_tokens global_batch_size",
        ),
    ],
)
def test_the_names_of_others_are_theirs(package: str, file: str, names: str) -> None:
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    tree = ast.parse((Path(found.submodule_search_locations[0]) / file).read_text())
    theirs = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    theirs |= {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    theirs |= {
        node.target.id for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and hasattr(node.target, "id")
    }
    for name in names.split():
        assert name in theirs, name
        assert name in hints.ALIASES, name


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"beta": 0.3}, "got dict; use VGPOConfig(**config)"),
        ({"visual_compensation_strength": 0.3}, "use vgpo_kernels.integrations.easyr1.authors_config(config)"),
        ("paper", "got str; use VGPOConfig.paper()"),
        ("vgpo", "use VGPOConfig.paper() or VGPOConfig.released()"),
        (VGPOConfig, "use VGPOConfig()"),
        (VGPOConfig.released, "call it: VGPOConfig.released()"),
        (None, "the paper's are VGPOConfig.paper()"),
        (PolicyLossOptions(), "options of the loss are keywords of their own"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_config_says_how_to_make_one(value: Any, says: str) -> None:
    for function in ("visual_weights", "group_weights", "combine_factors", "vgpo_loss", "linear_vgpo_loss"):
        assert changed(function, TypeError, config=value).endswith(says), function


UIDS = ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        ([0, 0, 1, 1], TypeError, "use torch.tensor(group_ids)"),
        ((0, 0, 1, 1), TypeError, "use torch.tensor(group_ids)"),
        (numpy.array([0, 0, 1, 1]), TypeError, "use torch.from_numpy(group_ids)"),
        (UIDS, TypeError, "torch.from_numpy(numpy.unique(group_ids, return_inverse=True)[1])"),
        (numpy.array(UIDS, object), TypeError, "torch.from_numpy(numpy.unique(group_ids, return_inverse=True)[1])"),
        (GOOD["group_ids"].float(), TypeError, "use group_ids.long()"),
        (GOOD["group_ids"][:, None], ValueError, "use group_ids.squeeze(-1)"),
        (GOOD["group_ids"][:, None].expand(B, T), ValueError, "such as group_ids[:, 0] where a row is all equal"),
        (GOOD["group_ids"][:2], ValueError, "next to each other, group_ids.repeat(2) where prompts alternate"),
        (VGPOConfig(), TypeError, "a VGPOConfig goes to config"),
        (GOOD["group_ids"].long, TypeError, "call it: .long()"),
    ],
)
def test_group_ids_say_how_they_are_made(value: Any, error: type[Exception], says: str) -> None:
    weighing = ("visual_weights", "group_weights", "shape_tokens", "response_factors")
    for function in (*weighing, "vgpo_loss", "linear_vgpo_loss"):
        assert changed(function, error, group_ids=value).endswith(says), function


def test_the_suggested_conversion_of_uids_is_taken() -> None:
    for uids in (UIDS, numpy.array(UIDS, object)):
        ids = torch.from_numpy(numpy.unique(uids, return_inverse=True)[1])
        factors = [vgpo_kernels.group_weights(GOOD["score"], found, VGPOConfig()) for found in (ids, GOOD["group_ids"])]
        assert torch.equal(*factors)


class Output(dict):
    """As transformers' outputs: a mapping whose entries are attributes, and ``None`` for those left out."""

    hidden_states = last_hidden_state = logits = None

    def __init__(self, **entries: Any) -> None:
        super().__init__(entries)
        self.__dict__.update(entries)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("hidden", (GOOD["hidden"],) * 3, "of the layers that output_hidden_states=True returns, take hidden[-1]"),
        ("hidden", Output(hidden_states=(GOOD["hidden"],)), "use hidden.hidden_states[-1]"),
        ("hidden", Output(last_hidden_state=GOOD["hidden"]), "use hidden.last_hidden_state"),
        ("hidden", Output(logits=GOOD["logp"]), "output_hidden_states=True).hidden_states[-1]"),
        ("hidden", nn.Linear(2, 2), "output_hidden_states=True).hidden_states[-1]"),
        ("hidden", {"input_ids": GOOD["targets"]}, "output_hidden_states=True).hidden_states[-1]"),
        ("hidden", GOOD["hidden"].numpy(), "use torch.from_numpy(hidden)"),
        ("hidden", GOOD["targets"], "ids? hidden states are expected"),
        ("weight", nn.Linear(D, V), "use weight.weight"),
        ("logp", Output(logits=GOOD["logp"]), "linear_logprob of hidden states, or logits.log_softmax(-1).gather"),
        ("logp", GOOD["targets"], "ids? log-probs are expected"),
        ("logp", list(GOOD["logp"]), "use torch.stack(logp)"),
        ("logp", [GOOD["logp"][0], GOOD["logp"][1, :3]], "pad_sequence(logp, batch_first=True)"),
        ("advantages", GOOD["advantages"].tolist(), "use torch.tensor(advantages)"),
        ("advantages", [[1.0], [1.0, 2.0]], "pad its rows to one length, then use torch.tensor"),
        ("advantages", torch.ones(B, dtype=torch.int64), "use advantages.float()"),
        ("num_tokens", True, "such as response_mask.sum()"),
        ("response_mask", GOOD["response_mask"].float(), "use response_mask.bool()"),
        ("visual_mask", GOOD["visual_mask"].float(), "use visual_mask.bool()"),
        ("targets", GOOD["targets"].float(), "use targets.long()"),
    ],
)
def test_a_value_of_another_type_says_how_to_make_a_tensor(name: str, value: Any, says: str) -> None:
    for function in ("policy_loss", "vgpo_loss", "linear_policy_loss", "linear_vgpo_loss", "visual_focus"):
        parameters = inspect.signature(getattr(vgpo_kernels, function)).parameters
        if name in parameters or (name == "num_tokens" and "loss" in function):
            message = changed(function, TypeError, **{name: value})
            assert message.startswith(name) and says in message, function


def test_outputs_of_transformers_say_what_to_take_of_them() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    hidden, logits = GOOD["hidden"], GOOD["logp"]
    for output, says in (
        (outputs.CausalLMOutputWithPast(logits=logits, hidden_states=(hidden,)), "use hidden.hidden_states[-1]"),
        (outputs.CausalLMOutputWithPast(logits=logits), "output_hidden_states=True).hidden_states[-1]"),
        (outputs.BaseModelOutputWithPast(last_hidden_state=hidden), "use hidden.last_hidden_state"),
    ):
        assert changed("visual_focus", TypeError, hidden=output).endswith(says)


def test_results_given_whole_say_which_part_is_meant() -> None:
    weights = vgpo_kernels.visual_weights(*(GOOD[name] for name in ("cos", "response_mask", "group_ids", "config")))
    assert changed("policy_loss", TypeError, factors=weights).endswith("use factors.factors")
    assert changed("group_weights", TypeError, score=weights).endswith("use score.score")
    assert changed("combine_factors", TypeError, psi=weights).endswith("use psi.psi")


# ---- shapes --------------------------------------------------------------------------------------------------------

FULL = torch.ones(B, S, dtype=torch.bool)
GATHER = "logits? Log-probs are logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)"


@pytest.mark.parametrize(
    ("functions", "changes", "says"),
    [
        (
            "policy_loss",
            {"response_mask": FULL},
            f"cut it to the last {T} positions, those of logp: response_mask[:, -5:]",
        ),
        ("policy_loss", {"logp": torch.zeros(B, S - 1)}, "those of response_mask: logp[:, -5:]"),
        (
            "policy_loss",
            {"response_mask": FULL, "logp": torch.zeros(B, S - 1)},
            f"cut it to the last {S - 1} positions, those of logp: response_mask[:, -11:]",
        ),
        ("policy_loss vgpo_loss", {"old_logp": torch.zeros(B, S)}, "old_logp[:, -5:]"),
        ("policy_loss vgpo_loss", {"logp": torch.zeros(B, T + 1)}, "of logits[:, -6:-1], one row before each"),
        ("policy_loss vgpo_loss", {"logp": torch.zeros(B, T, V)}, GATHER),
        ("policy_loss vgpo_loss", {"logp": torch.zeros(B, S, V)}, GATHER),
        ("policy_loss vgpo_loss", {"logp": torch.zeros(B, T, 1)}, "use logp.squeeze(-1)"),
        ("policy_loss vgpo_loss", {"logp": torch.zeros(T, B)}, "use logp.T"),
        ("policy_loss vgpo_loss", {"response_mask": torch.ones(B, T, 1) > 0}, "use response_mask.squeeze(-1)"),
        ("policy_loss", {"response_mask": torch.ones(T, B) > 0}, "is response_mask [T, B]? Use response_mask.T"),
        ("vgpo_loss visual_focus", {"response_mask": torch.ones(T, B) > 0}, "use response_mask.T"),
        (
            "policy_loss",
            {"response_mask": torch.ones(T) > 0},
            "use response_mask[None] for one sequence, or give cu_seqlens",
        ),
        ("policy_loss vgpo_loss", {"advantages": torch.zeros(B, 1)}, "use advantages.squeeze(-1)"),
        ("policy_loss vgpo_loss", {"advantages": torch.zeros(1, B)}, "use advantages.squeeze(0)"),
        ("policy_loss vgpo_loss", {"advantages": torch.zeros(2)}, "advantages.repeat_interleave(2, dim=0)"),
        ("policy_loss vgpo_loss", {"advantages": torch.zeros(B, S)}, "advantages[:, -5:]"),
        ("policy_loss", {"factors": torch.zeros(B)}, "one a response is factors[:, None].expand(-1, 5)"),
        (
            "policy_loss",
            {"factors": torch.zeros(B * T)},
            "a packed batch needs cu_seqlens and a packed response_mask [N]",
        ),
        ("policy_loss", {"num_tokens": torch.full((B,), T)}, "use num_tokens.sum()"),
        ("visual_focus", {"hidden": torch.zeros(2, B, S, D)}, "of stacked layers take hidden[-1], the last"),
        ("visual_focus", {"hidden": torch.zeros(S, D)}, "use hidden[None] for one sequence, or give cu_seqlens"),
        ("visual_focus", {"hidden": torch.zeros(B, S - 1, D)}, "hidden has to cover prompt and response as it does"),
        ("visual_focus", {"response_mask": torch.ones(B, S + 1) > 0}, "hidden has to cover the prompt, too"),
        (
            "visual_focus",
            {"visual_mask": FULL[:, : S - T]},
            "a prompt's does by torch.nn.functional.pad(visual_mask, (0, 5))",
        ),
        ("visual_focus", {"visual_mask": FULL[:, :T], "response_mask": FULL}, "is it swapped with response_mask?"),
        ("visual_focus", {"hidden": torch.zeros(1, S, D), "cu_seqlens": torch.tensor([0, S])}, "use hidden.squeeze(0)"),
        ("visual_focus", {"cu_seqlens": torch.tensor([0, S])}, "a padded batch takes no cu_seqlens"),
        ("linear_logprob", {}, "if these are the last ids, the states before them are hidden[:, -6:-1]"),
        (
            "linear_logprob",
            {"targets": torch.zeros(B, S + 1).long()},
            "if hidden lacks the last position, it predicts targets[:, 1:]",
        ),
        ("linear_logprob", {"weight": torch.zeros(D, V)}, "use weight.T"),
        ("group_weights", {"score": torch.zeros(B, 1)}, "use score.squeeze(-1)"),
        ("visual_weights", {"has_visual": GOOD["visual_mask"]}, "such as has_visual.any(-1)"),
    ],
)
def test_a_shape_one_step_away_says_the_step(functions: str, changes: dict[str, Any], says: str) -> None:
    for function in functions.split():
        message = changed(function, ValueError, **changes)
        assert says in message, message


def test_a_shape_that_is_no_slip_has_no_hint() -> None:
    for change in ({"bias": torch.zeros(1)}, {"bias": torch.zeros(V, 2)}, {"targets": torch.zeros(B, S, 2).long()}):
        assert changed("linear_logprob", ValueError, **change).endswith(" on cpu")
    assert changed("visual_weights", ValueError, group_ids=torch.zeros(B + 1).long()).endswith("int64[5] on cpu")


def test_advantages_in_the_place_of_the_mask_are_told() -> None:
    named = {"response_mask": GOOD["advantages"], "advantages": GOOD["response_mask"].float()}
    assert changed("policy_loss", ValueError, **named).endswith("advantages come before response_mask")


def test_the_suggested_steps_are_taken() -> None:
    """What the messages say leads to the numbers of good arguments."""
    good = [GOOD[name] for name in ("logp", "old_logp", "advantages", "response_mask")]
    logp, old_logp, advantages, mask = good
    expected = policy_loss(*good).loss
    longer = torch.cat([torch.zeros(B, S - 1 - T), logp], dim=1)
    full = torch.cat([torch.zeros(B, S - T, dtype=torch.bool), mask], dim=1)
    assert torch.equal(policy_loss(longer[:, -T:], old_logp, advantages, mask).loss, expected)
    old_longer = torch.cat([torch.zeros(B, S - 1 - T), old_logp], dim=1)
    torch.testing.assert_close(policy_loss(longer, old_longer, advantages, full[:, -(S - 1) :]).loss, expected)
    hidden, weight, targets = GOOD["hidden"], GOOD["weight"], GOOD["targets"]
    logits = hidden[:, -T - 1 : -1] @ weight.T
    gathered = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    torch.testing.assert_close(vgpo_kernels.linear_logprob(hidden[:, -T - 1 : -1], weight, targets), gathered)


# ---- masks of integers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "name", "value", "says"),
    [
        ("policy_loss", "response_mask", torch.where(FULL[:, :T], -100, 0), "got -100 to -100 in int64[4, 5] on cpu"),
        ("visual_focus", "response_mask", GOOD["targets"] - 100, "as by response_mask != -100"),
        ("visual_focus", "visual_mask", GOOD["visual_mask"].int() * 2, "got 0 to 2 in int32[4, 12] on cpu"),
        ("visual_weights", "has_visual", torch.tensor([0, 1, 2, 3]), "as by has_visual != 0"),
    ],
)
def test_a_mask_of_other_integers_is_refused(function: str, name: str, value: Tensor, says: str) -> None:
    message = changed(function, ValueError, **{name: value})
    assert message.startswith(f"{name} must hold 0 and 1, ") and says in message


def test_masks_of_zeros_and_ones_are_masks() -> None:
    good = [GOOD[name] for name in ("hidden", "visual_mask", "response_mask")]
    expected = vgpo_kernels.visual_focus(*good)
    for dtype in (torch.int64, torch.int8, torch.uint8):
        assert torch.equal(vgpo_kernels.visual_focus(good[0], *(mask.to(dtype) for mask in good[1:])), expected)
    assert policy_loss(*(torch.zeros(0, T),) * 2, torch.zeros(0), torch.zeros(0, T).int()).loss == 0


# ---- what it costs -------------------------------------------------------------------------------------------------


def test_text_is_made_only_to_be_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*given: Any, **named: Any) -> str:
        raise AssertionError("text that nobody reads")

    texts = [name for name, value in vars(hints).items() if inspect.isfunction(value) and name != "explained"]
    assert len(texts) > 10
    for name in texts:
        monkeypatch.setattr(hints, name, made)
    weighing = ("visual_weights", "group_weights", "shape_tokens", "response_factors")
    for function in ("policy_loss", "vgpo_loss", "linear_vgpo_loss", *weighing):
        called = getattr(vgpo_kernels, function)
        taken = inspect.signature(called).parameters
        called(**{name: value for name, value in GOOD.items() if name in taken})
    with pytest.raises(AssertionError, match="nobody reads"):
        policy_loss(None, None, None, None)
