"""check_batch: every mistake that passes silently is found and named, and nothing is found in right batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from right_batches import LAYOUTS, Plan, arguments, right_batch
from torch import Tensor, nn

from vgpo_kernels import BatchError, BatchFindings, Finding, check_batch

Batch = dict[str, Any]
MISTAKES: dict[str, list[Callable[[Batch], Batch]]] = {}


def mistake(name: str) -> Callable[[Callable[[Batch], Batch]], Callable[[Batch], Batch]]:
    """Register a mistake under the name of its finding: a function of a right batch that returns what it changes."""

    def register(make: Callable[[Batch], Batch]) -> Callable[[Batch], Batch]:
        MISTAKES.setdefault(name, []).append(make)
        return make

    return register


def gathered(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0].requires_grad_()


def with_gradient(batch: Batch) -> Batch:
    return {"hidden": batch["hidden"].detach().requires_grad_()}


def both(logp: Tensor) -> Batch:
    return {"logp": logp, "old_logp": logp.detach()}


@mistake("shifted")
def of_the_row_at_the_token(batch: Batch) -> Batch:
    """logits[:, -T:] in place of logits[:, -T-1:-1]."""
    logits = torch.cat([batch["logits"][..., 1:, :], batch["logits"][..., :1, :]], -2)
    return both(gathered(logits, batch["targets"]))


@mistake("shifted")
def of_the_next_token(batch: Batch) -> Batch:
    return both(batch["logp"].detach().roll(-1, -1).requires_grad_())


@mistake("shifted")
def of_the_token_before(batch: Batch) -> Batch:
    return {"logp": batch["logp"].detach().roll(1, -1).requires_grad_()}


@mistake("shifted")
def targets_of_a_linear_loss(batch: Batch) -> Batch:
    """No log-probs are given, and those that sampled do not fit the targets."""
    return {"logp": None, "old_logp": batch["logp"].detach().roll(-1, -1), **with_gradient(batch)}


@mistake("temperature")
def not_divided(batch: Batch) -> Batch:
    logits = batch["logits"] * torch.as_tensor(batch["temperature"])[..., None]
    return both(gathered(logits, batch["targets"])) | {"temperature": 0.6}


@mistake("temperature")
def of_the_sampler_alone(batch: Batch) -> Batch:
    """The engine's log-probs at 1, ours at the temperature that sampled."""
    logp = gathered(batch["logits"] / 0.5, batch["targets"])
    old = gathered(batch["logits"] * torch.as_tensor(batch["temperature"])[..., None], batch["targets"]).detach()
    return {"logp": logp, "old_logp": old, "temperature": 0.5 * batch["temperature"]}


@mistake("logits")
def logits_of_the_tokens(batch: Batch) -> Batch:
    return {"logp": batch["logits"].gather(-1, batch["targets"][..., None])[..., 0].requires_grad_()}


@mistake("logits")
def logits_and_no_head(batch: Batch) -> Batch:
    logp = (batch["logits"].amax(-1) + 1).requires_grad_()
    return {"logp": logp, "model_or_head": None}


@mistake("probabilities")
def exponentials(batch: Batch) -> Batch:
    return {"logp": batch["logp"].detach().exp().requires_grad_()}


@mistake("negated")
def cross_entropy(batch: Batch) -> Batch:
    return {"logp": (-batch["logp"].detach()).requires_grad_()}


@mistake("entropy")
def entropies(batch: Batch) -> Batch:
    p = batch["logits"].log_softmax(-1)
    return {"logp": -(p.exp() * p).sum(-1).requires_grad_()}


@mistake("hidden-states")
def another_layer(batch: Batch) -> Batch:
    return {"hidden": torch.randn_like(batch["hidden"])}


@mistake("hidden-states")
def other_rows(batch: Batch) -> Batch:
    """The hidden states of the batch before."""
    return {"hidden": batch["hidden"].flip(-2), "visual_mask": None, "group_ids": None}


@mistake("log-probs")
def of_other_responses(batch: Batch) -> Batch:
    logp = batch["logp"].detach()
    return {"old_logp": logp, "logp": logp.flip(0).requires_grad_()}


@mistake("group-ids")
def all_equal(batch: Batch) -> Batch:
    return {"group_ids": torch.zeros_like(batch["group_ids"])}


@mistake("group-ids")
def all_different(batch: Batch) -> Batch:
    return {"group_ids": torch.arange(len(batch["group_ids"]))}


@mistake("group-ids")
def repeat_for_repeat_interleave(batch: Batch) -> Batch:
    return {"group_ids": strided(batch)}


@mistake("group-ids")
def images_tell(batch: Batch) -> Batch:
    """Ids of the responses alone: the prompts are not known, their images are."""
    return {"group_ids": strided(batch), "ids": batch["targets"], "model_or_head": None}


@mistake("group-ids")
def prompts_tell(batch: Batch) -> Batch:
    return {"group_ids": strided(batch), "hidden": None}


@mistake("group-ids")
def advantages_tell(batch: Batch) -> Batch:
    return {"group_ids": strided(batch), "hidden": None, "ids": None, "model_or_head": None}


@mistake("group-ids")
def advantages_of_another_order(batch: Batch) -> Batch:
    """rewards.view(-1, n) where it should be view(n, -1).T, or the reverse."""
    return {"advantages": centred(PROMPTS, GENERATIONS).T.flatten()}


@mistake("no-image")
def of_another_id(batch: Batch) -> Batch:
    return {"visual_mask": batch["ids"] == -1}


@mistake("no-response")
def nothing_scored(batch: Batch) -> Batch:
    return {"response_mask": torch.zeros_like(batch["response_mask"])}


@mistake("mask-values")
def attention_bias(batch: Batch) -> Batch:
    """0 where an image token is, -1 elsewhere."""
    return {"visual_mask": batch["visual_mask"].long() - 1}


@mistake("mask-values")
def labels(batch: Batch) -> Batch:
    return {"response_mask": torch.where(batch["response_mask"], batch["targets"], -100)}


@mistake("mask-overlap")
def images_are_scored(batch: Batch) -> Batch:
    """The policy sampled an image token, and the mask of images was made without the response mask."""
    last = whole(batch, batch["response_mask"])
    return {"visual_mask": batch["visual_mask"] | last}


@mistake("masks-swapped")
def swapped(batch: Batch) -> Batch:
    scored, visual = whole(batch, batch["response_mask"]), batch["visual_mask"]
    return {"visual_mask": scored, "response_mask": visual, "logp": None, "old_logp": None, "hidden": None}


@mistake("prompt-overlap")
def whole_sequences_scored(batch: Batch) -> Batch:
    """The attention mask in place of the response mask."""
    scored = whole(batch, batch["response_mask"])
    attended = scored | (scored.flip(-1).cumsum(-1).flip(-1) > 0) if "cu_seqlens" not in batch else scored | True
    return {"response_mask": attended, "logp": None, "old_logp": None, **with_gradient(batch), "visual_mask": None}


@mistake("prompt-overlap")
def end_of_the_prompt_scored(batch: Batch) -> Batch:
    """One token too many, which only the mask of the prompts tells."""
    scored = whole(batch, batch["response_mask"])
    return {
        "prompt_mask": ~scored,
        "response_mask": scored | scored.roll(-1, -1),
        "logp": None,
        "old_logp": None,
        "hidden": None,
    }


@mistake("rewards")
def rewards_for_advantages(batch: Batch) -> Batch:
    return {"advantages": torch.arange(len(batch["group_ids"])).remainder(2).float()}


@mistake("log-probs")
def a_buffer_that_was_never_filled(batch: Batch) -> Batch:
    return {"old_logp": torch.zeros_like(batch["old_logp"])}


@mistake("nonfinite")
def a_reward_that_failed(batch: Batch) -> Batch:
    advantages = batch["advantages"].clone()
    advantages[1] = torch.nan
    return {"advantages": advantages}


@mistake("nonfinite")
def a_token_that_cannot_be(batch: Batch) -> Batch:
    old = batch["logp"].detach().clone()
    old[batch["response_mask"]] = -math.inf
    return {"old_logp": old}


@mistake("nonfinite")
def a_state_that_overflowed(batch: Batch) -> Batch:
    hidden = batch["hidden"].clone()
    hidden[batch["visual_mask"]] = math.inf
    return {"hidden": hidden, "group_ids": None}


@mistake("detached")
def without_gradient(batch: Batch) -> Batch:
    return {"logp": batch["logp"].detach()}


@mistake("detached")
def captured_states(batch: Batch) -> Batch:
    """A loss of hidden and head, with states that a hook detached."""
    return {"logp": None}


PROMPTS, GENERATIONS = 3, 4
DTYPES = (torch.float32, torch.bfloat16)
FOLLOW = ("mask-overlap", "prompt-overlap")  # what a mask of wrong values does besides
EVERY = [(name, make) for name, made in MISTAKES.items() for make in made]


def whole(batch: Batch, mask: Tensor) -> Tensor:
    """A mask of the responses, over whole sequences."""
    missing = batch["visual_mask"].shape[-1] - mask.shape[-1]
    return nn.functional.pad(mask, (missing, 0))


def strided(batch: Batch) -> Tensor:
    return torch.arange(len(batch["group_ids"])) % PROMPTS


def centred(*shape: int) -> Tensor:
    rewards = torch.randn(shape)
    return rewards - rewards.mean(1, keepdim=True)


def plain_batch(seed: int, layout: str = "last T") -> Batch:
    """A right batch to make one mistake in: responses to a prompt stand next to each other, log-probs are at hand."""
    plan = Plan(seed, PROMPTS, GENERATIONS, layout, DTYPES[seed % 2], order="blocks", images=True, odd=False)
    batch = right_batch(plan)
    return batch | {"old_logp": batch["logp"].detach(), "advantages": centred(PROMPTS, GENERATIONS).flatten()}


@pytest.mark.parametrize("hundred", range(10))
def test_nothing_is_found_in_right_batches(hundred: int) -> None:
    for seed in range(100 * hundred, 100 * hundred + 100):
        found = check_batch(**arguments(right_batch(Plan(seed))))
        assert found == (), f"seed {seed}: {found}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "make"), EVERY, ids=[make.__name__ for _, make in EVERY])
def test_a_mistake_is_found_and_named(name: str, make: Callable[[Batch], Batch], layout: str) -> None:
    for seed in range(2):
        batch = plain_batch(seed, layout)
        right = arguments(batch)
        assert check_batch(**right) == ()
        found = check_batch(**arguments(batch | make(batch)))
        assert name in found.names and set(found.names) <= {name, *FOLLOW}, f"seed {seed}: {found}"


def test_it_raises_on_request() -> None:
    batch = plain_batch(0)
    arguments_of_two = arguments(batch | all_equal(batch) | without_gradient(batch))
    lines = r"the batch looks wrong:\ngroup-ids: .*\ndetached: logp has no gradient"
    with pytest.raises(BatchError, match=lines) as error:
        check_batch(**arguments_of_two, raises=True)
    assert error.value.findings.names == ("group-ids", "detached")
    assert check_batch(**arguments(batch), raises=True) == ()


def test_findings_print_a_line_each() -> None:
    found = BatchFindings([Finding("shifted", "by one")], ["hidden: not given"])
    assert str(found) == "shifted: by one\nnot checked: hidden: not given"
    assert repr(found) == "<BatchFindings: shifted>" and found.names == ("shifted",)
    nothing = BatchFindings()
    assert (str(nothing), repr(nothing)) == ("nothing looks wrong", "<BatchFindings: nothing looks wrong>")


def test_what_is_not_given_is_not_checked_and_told() -> None:
    batch = plain_batch(0)
    found = check_batch(None, None, None, batch["logp"], None, None, None, batch["response_mask"], None)
    assert found == () and found.unchecked == ("logp against hidden: no model or head is given",)
    found = check_batch(batch["head"], None, None, batch["logp"], None, None, None, batch["response_mask"], None)
    assert found.unchecked == ("logp against hidden: hidden or ids are not given",)
    assert check_batch(None, None, None, None, None, None, None, batch["response_mask"], None).unchecked == ()


@pytest.mark.parametrize("head", ["sharded", "freed", "quantised"])
def test_a_head_that_cannot_be_read_is_told(head: str) -> None:
    batch = plain_batch(0)
    layer = batch["head"]
    if head == "quantised":

        class Quantised(nn.Linear):
            pass

        layer.__class__ = Quantised
    else:
        layer.weight = nn.Parameter(layer.weight.flatten() if head == "sharded" else layer.weight.detach().clone())
    if head == "freed":
        layer.weight.untyped_storage().resize_(0)
    found = check_batch(**arguments(batch))
    why = "no plain linear layer but Quantised" if head == "quantised" else "sharded over processes"
    assert found == () and len(found.unchecked) == 1 and why in found.unchecked[0]


def test_nothing_is_changed() -> None:
    batch = arguments(plain_batch(0))
    batch["hidden"] = batch["hidden"].requires_grad_()
    before = {name: value.detach().clone() for name, value in batch.items() if isinstance(value, Tensor)}
    state = torch.get_rng_state()
    check_batch(**batch)
    assert all(torch.equal(batch[name], value) for name, value in before.items())
    assert batch["hidden"].grad is None and torch.equal(torch.get_rng_state(), state)


def test_without_gradients_nothing_is_detached() -> None:
    batch = plain_batch(0)
    with torch.no_grad():
        assert check_batch(**arguments(batch | without_gradient(batch))) == ()


def test_a_scale_of_the_logits_is_the_temperatures_inverse() -> None:
    batch = plain_batch(0) | {"logit_scale": 2.0}
    (finding,) = check_batch(**arguments(batch))
    assert finding.name == "temperature" and f"temperature of {2 * batch['temperature']:.3g} instead" in finding.message


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_or_head": "Qwen"}, TypeError, "model_or_head must be a model .* its LM head, or the head's weight"),
        (
            {"ids": torch.zeros(2, 3, dtype=torch.int64)},
            ValueError,
            r"ids must have shape \[12, \d+\] \(the tokens of the",
        ),
        ({"ids": torch.zeros(2, 3)}, TypeError, "ids must be an integer tensor"),
        ({"samples": 0}, ValueError, "samples must be at least 1"),
        ({"raises": 1}, TypeError, "raises must be True or False"),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and above 0"),
        ({"model_or_head": torch.zeros(7, 2)}, ValueError, "model_or_head must have a column for each of the"),
        ({"prompt_mask": torch.ones(3, 3)}, TypeError, "prompt_mask must be bool"),
        ({"group_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, "group_ids must have shape"),
    ],
)
def test_arguments_that_do_not_fit_raise(change: Batch, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_batch(**arguments(plain_batch(0)) | change)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_of_responses_alone_are_no_prompts(layout: str) -> None:
    """A driver has no whole sequences: masks begin with a scored token, and ids with an answer."""
    batch = plain_batch(0, layout)
    alone = torch.ones_like(batch["response_mask"])
    given = {"logp": None, "hidden": None, "visual_mask": None, "old_logp": None, "response_mask": alone}
    ids = None if layout == "packed" else batch["targets"]
    assert check_batch(**arguments(batch) | given | {"ids": ids, "model_or_head": None}) == ()


def test_states_that_were_cut_like_logits_are_told() -> None:
    batch = arguments(plain_batch(0, "T = S - 1"))
    with pytest.raises(ValueError, match=r"hidden must have a row for each of the \d+ positions of ids, .*stays whole"):
        check_batch(**batch | {"hidden": batch["hidden"][:, :-1], "visual_mask": batch["visual_mask"][:, :-1]})


def test_a_mask_of_the_prompt_alone_has_to_be_longer() -> None:
    batch = arguments(plain_batch(0))
    prompt = batch["visual_mask"].shape[1] - batch["response_mask"].shape[1]
    with pytest.raises(ValueError, match=r"torch.nn.functional.pad\(visual_mask"):
        check_batch(**batch | {"visual_mask": batch["visual_mask"][:, :prompt]})
