"""check_batch finds nothing in right batches of rarer kinds: each was taken for a mistake once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from right_batches import IMAGE, PAD
from torch import Tensor, nn

from vgpo_kernels import BatchFindings, check_batch

D, V, T = 16, 60, 8
NAMES = ("hidden", "ids", "logp", "old_logp", "advantages", "visual_mask", "group_ids")


def looked(model_or_head: Any = None, **given: Any) -> BatchFindings:
    with torch.no_grad():  # nothing here has a gradient
        return check_batch(model_or_head, **dict.fromkeys(NAMES) | given)


def batch(size: int = 4, prompts: int = 1) -> dict[str, Tensor]:
    """Responses to ``prompts`` prompts of one question, 12 tokens long, with images of their own."""
    torch.manual_seed(0)
    ids = torch.randint(3, V, (size, 12 + T))
    ids[:, :12] = torch.tensor([5, 6, *[IMAGE] * 5, 7, 8, 9, 2, 2])
    group = torch.arange(size) * prompts // size
    hidden = torch.randn(size, 12 + T, D)
    hidden[:, :12] = torch.randn(prompts, 12, D)[group]
    visual = torch.zeros_like(ids, dtype=torch.bool)
    visual[:, 2:7] = True
    mask = torch.ones(size, T, dtype=torch.bool)
    return {"hidden": hidden, "ids": ids, "visual_mask": visual, "response_mask": mask, "group_ids": group}


def test_dropout_in_the_responses_to_one_prompt() -> None:
    given = batch()
    given["hidden"] = nn.functional.dropout(given["hidden"], 0.1)
    assert looked(**given) == ()


def test_an_image_that_is_augmented_once_in_each_group() -> None:
    """Half of the responses see the image, half see it distorted (NoisyRollout)."""
    given = batch(8, prompts=4)
    given["group_ids"] = torch.arange(8) // 4
    assert looked(**given) == ()
    given["group_ids"] = torch.tensor([0, 0, 0, 1, 0, 1, 1, 1])  # two images have changed places
    assert looked(**given).names == ("group-ids",)
    assert looked(**given | {"group_ids": torch.zeros(8, dtype=torch.int64)}).names == ("group-ids",)


def test_responses_whose_first_token_is_not_scored() -> None:
    given = batch()
    given["ids"][:, 12] = torch.tensor([20, 21, 20, 21])
    given["response_mask"][:, 0] = False
    assert looked(**given) == ()
    given["ids"][:, 12] = torch.tensor([20, 21, 22, 23])
    assert looked(**given) == ()


def test_padding_before_prompt_and_response() -> None:
    """Sequences end at one position, so that responses to one prompt begin at several."""
    question = torch.tensor([5, 6, 7, 8, 2, 2])
    ids, mask = torch.full((4, 20), PAD), torch.zeros(4, 20, dtype=torch.bool)
    for row, length in enumerate((3, 5, 6, 12)):
        ids[row, -length - 6 :] = torch.cat([question, torch.randint(3, V, (length,))])
        mask[row, -length:] = True
    given = {"hidden": torch.zeros(4, 20, D), "response_mask": mask, "group_ids": torch.zeros(4, dtype=torch.int64)}
    assert looked(ids=ids, **given) == ()
    ids[(ids == 6) & ~mask] = torch.tensor([6, 6, 40, 40])
    assert looked(ids=ids, **given).names == ("group-ids",)


def test_prompts_of_one_token_are_no_padding() -> None:
    given = batch()
    assert looked(ids=given["ids"][:, 11:], response_mask=given["response_mask"]) == ()


def test_prompts_of_an_image_alone_are_no_padding() -> None:
    given = batch()
    ids = torch.cat([torch.full((4, 3), IMAGE), given["ids"][:, -T:]], dim=1)
    visual = nn.functional.pad(ids[:, :3] == IMAGE, (0, T))
    assert looked(ids=ids, response_mask=given["response_mask"], visual_mask=visual) == ()


def test_one_image_has_many_questions_and_one_question_many_images() -> None:
    given = batch(size=4, prompts=1) | {"group_ids": torch.arange(4)}
    assert looked(**given | {"ids": given["ids"][:, -T:]}) == ()  # the questions are not known
    assert looked(**given | {"hidden": None}) == ()  # the images are not known
    assert looked(**given).names == ("group-ids",)


def test_a_tool_that_shows_an_image_to_the_end() -> None:
    ids = torch.randint(3, V, (1, 20))
    mask, visual = torch.zeros(2, 1, 20, dtype=torch.bool)
    mask[0, 5:9] = visual[0, 12:15] = True
    ids[visual] = IMAGE
    assert looked(ids=ids, response_mask=mask, visual_mask=visual) == ()
    ids[visual], ids[mask] = torch.tensor([9, 8, 7]), IMAGE
    assert looked(ids=ids, response_mask=mask, visual_mask=visual).names == ("masks-swapped",)


def test_advantages_that_are_whitened_over_the_batch() -> None:
    """Two of them may cancel that are not of one group."""
    values = torch.tensor([1.1, 0.0, 1.0, 0.1])
    advantages = (values - values.mean()) / values.std()
    groups = torch.tensor([0, 1, 0, 1])
    mask = torch.ones(4, T, dtype=torch.bool)
    assert looked(advantages=advantages, response_mask=mask, group_ids=groups) == ()


def policy(sharpness: float, seed: int = 0, offset: float = 0.0) -> tuple[nn.Linear, dict[str, Tensor], Tensor]:
    """Return a head, a batch whose tokens it samples, and its distributions ``[B, T, V]``."""
    given = batch(8)
    torch.manual_seed(seed)
    given["hidden"][:, 12:] = torch.randn(8, T, D)
    given["hidden"][..., 0] = 6
    head = nn.Linear(D, V, bias=False)
    nn.init.normal_(head.weight, std=sharpness)
    head.weight.data[:, 0] = offset  # of all logits alike
    distribution = head(given["hidden"]).log_softmax(-1)[:, -T - 1 : -1].detach()
    given["ids"][:, -T:] = distribution.exp().flatten(0, 1).multinomial(1).view(8, T)
    return head, {name: given[name] for name in ("hidden", "ids", "response_mask")}, distribution


def of(distribution: Tensor, given: dict[str, Tensor]) -> Tensor:
    return distribution.gather(-1, given["ids"][:, -T:, None])[..., 0]


def test_log_probs_of_what_top_p_leaves() -> None:
    for seed in range(6):
        head, given, distribution = policy(1.0, seed)
        ordered, order = distribution.exp().sort(-1, descending=True)
        kept = torch.zeros_like(ordered, dtype=torch.bool).scatter(-1, order, ordered.cumsum(-1) - ordered < 0.8)
        left = distribution.masked_fill(~kept, -torch.inf).log_softmax(-1)
        given["ids"][:, -T:] = left.exp().flatten(0, 1).multinomial(1).view(8, T)
        assert looked(head, old_logp=of(left, given), logp=of(distribution, given), **given) == ()


def test_logits_of_16_bits_and_states_of_32() -> None:
    """As autocast leaves them, outside of which the batch is looked at."""
    for seed in range(4):
        head, given, _ = policy(2.0, seed, offset=8.0)
        with torch.autocast("cpu", torch.bfloat16):
            distribution = head(given["hidden"]).float().log_softmax(-1)[:, -T - 1 : -1].detach()
        assert looked(head, logp=of(distribution, given), **given) == ()


def test_a_confident_policy_in_an_engine() -> None:
    """Nearly all log-probs are 0, and what is left of them looks like anything, above all of few tokens."""
    for seed in range(10):
        head, given, distribution = policy(10.0, seed)
        noisy = given["hidden"] * (1 + 0.02 * torch.randn(8, 12 + T, D))
        old = of(head(noisy).log_softmax(-1)[:, -T - 1 : -1].detach(), given)
        assert looked(head, old_logp=old, logp=of(distribution, given), **given) == ()
        given["response_mask"] = torch.arange(T).expand(8, T) == T - 1
        assert looked(head, old_logp=old, **given) == ()


def test_a_few_rows_that_are_shifted_are_found() -> None:
    head, given, distribution = policy(1.0)
    logp = of(distribution, given)
    logp[6:] = logp[6:].roll(-1, -1)
    assert looked(head, logp=logp, **given).names == ("hidden-states",)


def test_states_of_other_rows_are_not_taken_for_entropies() -> None:
    for seed in range(10):
        head, given, distribution = policy(2.0, seed)
        found = looked(head, logp=of(distribution, given), **given | {"hidden": given["hidden"].flip(0)})
        assert not {"logits", "probabilities", "negated", "entropy"} & set(found.names) and found


class Quantised(Tensor):
    """A weight that holds other numbers than it multiplies by, as libraries of quantised layers have."""

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        raise NotImplementedError(f"{function} of a quantised weight")


def test_heads_that_cannot_be_read_are_told() -> None:
    head, given, distribution = policy(1.0)
    weight = Tensor._make_wrapper_subclass(Quantised, head.weight.shape, dtype=torch.float32)
    del head.weight
    object.__setattr__(head, "weight", weight)
    found = looked(head, logp=of(distribution, given), **given)
    assert found == () and "weight is a Quantised" in found.unchecked[0]

    class Headless(nn.Module):
        def get_output_embeddings(self) -> nn.Module:
            raise NotImplementedError

    found = looked(Headless(), logp=of(distribution, given), **given)
    assert found == () and "Headless has no LM head" in found.unchecked[0]


def test_a_head_of_which_peft_trains_a_copy() -> None:
    peft = pytest.importorskip("peft")
    head, given, distribution = policy(1.0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = head
            self.query = nn.Linear(2, 2)

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

    model = peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["query"], modules_to_save=["lm_head"]))
    found = looked(model, logp=of(distribution, given), **given)
    assert found == () and found.unchecked == ()
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(0.3)
    trained = model.base_model.model.lm_head(given["hidden"]).log_softmax(-1)[:, -T - 1 : -1].detach()
    assert looked(model, logp=of(trained, given), **given) == ()
    assert looked(model, logp=of(distribution, given), **given) != ()
    with model.disable_adapter():
        assert looked(model, logp=of(distribution, given), **given) == ()
