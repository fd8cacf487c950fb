"""What the adapters must get right of an architecture, each as one function: a verdict, or an assertion that fails.

A check either compares with the model's own numbers, or the adapter has refused the model by name; silently wrong is
the one thing that it may not be.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from architectures.verdicts import Verdict, refused, run, works
from architectures.view_checks import blind_pass, views
from architectures.zoo import ANSWER, Example
from eager_attention import assert_same
from torch import Tensor, nn
from trl.trainer.utils import add_fused_lm_head
from vgpo_trainer.fused_head import fuse_heads, probe_tokens
from vgpo_trainer.lora import decoder_linears, decoder_targets

from vgpo_kernels import check_batch
from vgpo_kernels.integrations.transformers import (
    GENERATED,
    attention_segments,
    capture_attention_mass,
    capture_hidden_states,
    unwrap,
    visual_mask,
)

LOG_PROBS = 2e-4
NEW_TOKENS = 6


def head_of(model: Any) -> nn.Module:
    head = model.get_output_embeddings()
    return head if head is not None else next(m for name, m in model.named_modules() if name.endswith("lm_head"))


@contextmanager
def first_inputs(module: nn.Module, name: str | None = None) -> Any:
    """Collect the tensors that a module is handed."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        seen.append(options[name] if name in options else arguments[0])

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def hidden_states(example: Example) -> Verdict:
    """What is captured is bit for bit what the LM head reads."""
    model, inputs = example
    with capture_hidden_states(model) as captured, first_inputs(head_of(model)) as read:
        run(model, inputs)
    assert captured.hidden.shape[:2] == inputs["input_ids"].shape
    if torch.equal(captured.hidden, read[0]):
        return works()
    # A factor before the head changes no cosine.
    factor = (captured.hidden * read[0]).sum() / read[0].square().sum()
    torch.testing.assert_close(captured.hidden, read[0] * factor, rtol=1e-5, atol=1e-6)
    return works(f"the head reads them divided by {factor:.3g}")


def visual_tokens(example: Example) -> Verdict:
    """The positions that change with the pixels, where the decoder begins, are visual tokens."""
    model, inputs = example
    mask = visual_mask(inputs["input_ids"], model)
    assert mask.any(dim=1).all() and not mask[:, -ANSWER:].any()
    stack = unwrap(model).get_submodule(decoder_linears(model)[0])
    reads = []
    for change in (False, True):
        pixels = {
            name: torch.randn_like(value) if change and "pixel" in name and value.is_floating_point() else value
            for name, value in inputs.items()
        }
        # Some decoders add features after their first layers.
        with first_inputs(stack[0], "hidden_states") as first, first_inputs(stack[-1], "hidden_states") as last:
            run(model, pixels)
        reads.append((first[0], last[0]))
    (first, last), (other_first, other_last) = reads
    changed = differing(first, other_first, mask.shape)
    if not changed.any():
        changed = differing(last, other_last, mask.shape)
        begins = [int(row.nonzero()[0]) for row in mask]
        assert changed.any() and all(not row[:begin].any() for row, begin in zip(changed, begins, strict=True))
        return works("the features enter after the first layer")
    assert not (changed & ~mask).any(), "an image feature where no visual token stands"
    return works()


def differing(one: Tensor, other: Tensor, shape: torch.Size) -> Tensor:
    """Positions ``[B, S]`` where hidden states differ; some decoders carry several streams of them."""
    differ = (one != other).any(-1)
    if differ.shape[:2] != shape:
        differ = differ.any(0)
    return differ if differ.dim() == 2 else differ.any(-1)


def attention_shares(example: Example) -> Verdict:
    """Shares equal those of eager's weights, in a pass and in ``generate``, whatever function computes attention."""
    model, inputs = example
    answered = torch.ones(2, ANSWER, dtype=torch.bool)
    segments = attention_segments(inputs["input_ids"], model, inputs["attention_mask"], answered)
    real = inputs["attention_mask"]
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    functions = ["eager"]
    masses, steps = {}, {}
    try:
        model.set_attn_implementation("sdpa")
        functions.append("sdpa")
    except ValueError:
        pass
    for function in functions:
        model.set_attn_implementation(function)
        is_eager = function == "eager"
        try:
            with capture_attention_mass(model, segments) as captured:
                output = run(model, inputs, **({"output_attentions": True} if is_eager else {}))
            masses[function] = captured.masses
            with capture_attention_mass(model, segments) as captured:
                more = {"output_attentions": True, "return_dict_in_generate": True} if is_eager else {}
                generated = model.generate(**inputs, **options, **more)
            steps[function] = captured.passes
        except (TypeError, ValueError) as error:
            return refused(error)
        if is_eager:
            expected = shares_of(attentions_of(output), segments)
            expected_steps = [shares_of(weights, segments, step) for step, weights in enumerate(generated.attentions)]
    for function in functions:
        assert masses[function].shape == expected.shape
        assert_same(masses[function], expected, real)
        assert len(steps[function]) == len(expected_steps) == NEW_TOKENS
        for step, (found, wanted) in enumerate(zip(steps[function], expected_steps, strict=True)):
            assert_same(found, wanted, real if step == 0 else torch.ones(2, 1))
    return works("" if len(captured.layers) == layers_of(model) else f"layers {', '.join(map(str, captured.layers))}")


def layers_of(model: nn.Module) -> int:
    return len(unwrap(model).get_submodule(decoder_linears(model)[0]))


def shares_of(weights: Any, segments: Tensor, generated: int = 0) -> Tensor:
    """Eager weights ``[B, Hq, T, S]`` of each layer to shares ``[B, layers, T, 3]``; a window's cache drops keys."""
    labels = nn.functional.pad(segments, (0, generated), value=GENERATED)
    members = torch.stack([labels == segment for segment in range(3)], dim=-1).float()[:, None]
    layers = [layer.float() for layer in weights if layer is not None]
    return torch.stack([(layer @ members[:, :, -layer.shape[-1] :]).mean(1) for layer in layers], dim=1)


def attentions_of(output: Any) -> Any:
    return output.attentions if "attentions" in output else output.language_model_outputs.attentions


def log_probs(example: Example) -> Verdict:
    """Log-probabilities of the answer by the trainer's head equal those of the model's own logits.

    In bfloat16, where a small change of the logits hides in their rounding, the same head is chosen. check_batch, which
    takes what the configuration says of the logits, finds them right as well.
    """
    model, inputs = example
    ids = inputs["input_ids"]
    with capture_hidden_states(model) as captured:
        expected = run(model, inputs).logits[:, :-1].float().log_softmax(-1)
    expected = expected[:, -ANSWER:].gather(-1, ids[:, -ANSWER:, None])[..., 0]
    answer = torch.ones(len(ids), ANSWER, dtype=torch.bool)
    images = visual_mask(ids, model, answer)
    with torch.no_grad():
        assert check_batch(model, captured.hidden, ids, expected, None, None, images, answer, torch.arange(2)) == ()
    narrow = deepcopy(model).to(torch.bfloat16)
    kind = kind_of_head(model)
    labels = ids.clone()
    labels[:, :-ANSWER] = -100
    found = run(model, inputs, labels=labels, fused_lm_head=True).log_probs[:, -ANSWER:]
    torch.testing.assert_close(found, expected, atol=LOG_PROBS, rtol=1e-5)
    if runs(narrow):
        assert kind_of_head(narrow) == kind
    return works(kind)


def runs(model: Any) -> bool:
    """Whether a model that was cast as a whole still runs: some keep parts in fp32."""
    try:
        run(model, {"input_ids": probe_tokens(model)})
    except (RuntimeError, TypeError):
        return False
    return True


def kind_of_head(model: Any) -> str:
    """Give a model the trainer's head; return which."""
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fuse_heads((model,), 1.0, fp32=False)


def lora(example: Example) -> Verdict:
    """An adapter reaches every linear layer of the decoder's layers, and nothing else."""
    from peft import LoraConfig, get_peft_model

    model = example.model
    prefix, paths = decoder_linears(model)
    wanted = {f"{prefix}.{index}.{path}" for index, path in linears_of(model, prefix) if path in paths}
    adapted = get_peft_model(model, LoraConfig(r=2, **decoder_targets(model)))
    names = {name.removeprefix("base_model.model.") for name, _ in adapted.named_parameters() if "lora_A" in name}
    found = {name.partition(".lora_A")[0].removesuffix(".base_layer") for name in names}
    assert found and all(name.startswith(f"{prefix}.") for name in found)
    if found == wanted:
        return works()
    # PEFT maps the names of some mixtures' shared experts to the parameters of all experts.
    assert {name.rpartition(".")[2] for name in found - wanted} <= {"experts"}, found - wanted
    assert {name.rpartition(".")[2] for name in wanted - found} <= {"gate_proj", "up_proj", "down_proj"}, wanted - found
    return works("PEFT adapts the experts")


def linears_of(model: nn.Module, prefix: str) -> list[tuple[str, str]]:
    stack = unwrap(model).get_submodule(prefix)
    names = [name for name, module in stack.named_modules() if isinstance(module, nn.Linear)]
    return [(index, path) for index, _, path in (name.partition(".") for name in names)]


CHECKS: dict[str, Callable[[Example], Verdict]] = {
    "hidden states": hidden_states,
    "visual tokens": visual_tokens,
    "attention shares": attention_shares,
    "log-probs": log_probs,
    "LoRA": lora,
    "views": views,
    "blind pass": blind_pass,
}
