"""What ``vgpo doctor`` proves on a tiny LLaVA: hidden states, attention, the fused head and a training step.

Each check compares what this package computes with what the model computes by itself, in the installed releases of
transformers and TRL, on one device. They download nothing and take a second together on a CPU; most of the time goes
into importing TRL.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

TOLERANCE = 1e-4  # of shares of attention and of log-probabilities, in fp32
NEW_TOKENS = 6
TEMPERATURE = 0.9
LEARNING_RATE = 1e-3
VGPO_METRICS = (
    "visual_focus",
    "gate_rate",
    "late_early_ratio",
    "psi_std",
    "phi_std",
    "weighted_share",
    "nonfinite_responses",
    "groups",
    "singleton_groups",
    "factor_mean",
    "factor_min",
    "factor_max",
    "old_policy_kl",
    "nonfinite_advantages",
)
UNDEFINED = ("vgpo/phi_length_corr",)  # where all responses of a batch are equally long


class Failure(Exception):
    """What a check found to be wrong, in words."""


class Check(NamedTuple):
    """A claim and its proof.

    Attributes:
        claim: What is true if the check passes.
        needs: Packages without which nothing is claimed.
        prove: Takes the type of a device; raises where the claim is false on it.
    """

    claim: str
    needs: tuple[str, ...]
    prove: Callable[[str], None]


class Outcome(NamedTuple):
    """What became of a check.

    Attributes:
        claim: The check's.
        missing: Packages that it needs and that are not installed.
        failure: Why the claim is false, or None.
    """

    claim: str
    missing: tuple[str, ...]
    failure: str | None


def outcomes(device: str) -> Iterator[Outcome]:
    """Run every check on a device, and yield what became of each as it ends."""
    # Read when huggingface_hub is imported: nothing is fetched, and TRL does not report that a trainer was made.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for check in CHECKS:
        missing = tuple(name for name in check.needs if importlib.util.find_spec(name) is None)
        yield Outcome(check.claim, missing, None if missing else failure_of(check, device))


def failure_of(check: Check, device: str = "cpu") -> str | None:
    """Why a check's claim is false on a device, in one line, or None."""
    try:
        with quiet(), one_thread():
            check.prove(device)
    except Failure as failure:
        return str(failure)
    except Exception as error:  # whatever it is, the diagnosis goes on and says so
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread in the block: several cost such small work more than they save, on a busy machine most."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep to themselves what libraries print, log and warn of in the block."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(disabled)


def tiny_model(device: str) -> tuple[Any, Any]:
    """A tiny LLaVA for inference on a device, and its processor."""
    import torch

    from vgpo_trainer.demo.tiny_vlm import build_model, build_processor

    processor = build_processor()
    model: Any = build_model(processor).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "language_model" in name and name.endswith("q_proj.weight"):
                weight *= 8  # the attention of a new model is all but even, and hardly depends on what is looked at
    return model.to(device), processor


def pictures(number: int) -> list[Any]:
    """Images of noise, as large as the tiny model takes them."""
    import numpy as np
    from PIL import Image

    from vgpo_trainer.demo.digits import IMAGE_SIZE

    generator = np.random.default_rng(0)
    shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    return [Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)) for _ in range(number)]


def padded_batch(processor: Any, device: str) -> Any:
    """Inputs on a device of two images with a prompt and the beginning of an answer, the second padded on its left."""
    from vgpo_trainer.demo.digits import PROMPT
    from vgpo_trainer.demo.tiny_vlm import IMAGE, RESPOND

    texts = [IMAGE + PROMPT + RESPOND + answer for answer in ("0+3=3, 3", "1+")]
    return processor(images=pictures(2), text=texts, padding=True, return_tensors="pt").to(device)


def ordinary_tokens_only(processor: Any) -> dict[str, Any]:
    """Options of generation that make it write ``NEW_TOKENS`` tokens, none of which is an image or an end."""
    from vgpo_trainer.demo.tiny_vlm import SPECIAL_TOKENS

    special = processor.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    return {"min_new_tokens": NEW_TOKENS, "suppress_tokens": special}


def expect_equal(found: Any, expected: Any, where: Any, tolerance: float) -> None:
    """Raise Failure unless two tensors have the same shape and are as close as said.

    Args:
        found: What this package computed.
        expected: What the model computes.
        where: Which entries count, a mask that broadcasts.
        tolerance: Largest difference allowed.
    """
    if found.shape != expected.shape:
        raise Failure(f"shape {list(found.shape)} in place of {list(expected.shape)}")
    error = float((found.float() - expected.float()).abs().masked_fill(~where.expand_as(found), 0).max())
    if not error <= tolerance:
        raise Failure(f"wrong by {error:.1e}")


def prove_hidden_states(device: str) -> None:
    """Compare captured hidden states with the input of the LM head, bit for bit."""
    import torch

    from vgpo_kernels.integrations.transformers import capture_hidden_states

    model, processor = tiny_model(device)
    read: list[Any] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda head, arguments: read.append(arguments[0]))
    with torch.no_grad(), capture_hidden_states(model) as captured:
        model(**padded_batch(processor, device))
    expect_equal(captured.hidden, read[0], torch.ones(1, dtype=torch.bool, device=device), tolerance=0.0)


def prove_attention(device: str) -> None:
    """Compare captured shares of attention with sums of the weights that eager attention returns."""
    import torch

    from vgpo_kernels.integrations.transformers import SEGMENT_NAMES, attention_segments, capture_attention_mass

    model, processor = tiny_model(device)
    inputs = padded_batch(processor, device)
    real = inputs["attention_mask"]
    segments = attention_segments(inputs["input_ids"], model, real, torch.ones(2, 2, dtype=torch.bool, device=device))
    with torch.no_grad():
        with capture_attention_mass(model, segments) as captured:
            model(**inputs)
        model.set_attn_implementation("eager")
        weights = model(**inputs, output_attentions=True).attentions
    members = torch.stack([segments == segment for segment in range(len(SEGMENT_NAMES))], dim=-1).float()
    expected = torch.stack([layer.mean(1) @ members for layer in weights], dim=1)
    expect_equal(captured.masses, expected, real.bool()[:, None, :, None], TOLERANCE)


def prove_attention_in_generate(device: str) -> None:
    """Compare the shares of tokens as they are generated with those of one pass over all of them."""
    import torch

    from vgpo_kernels.integrations.transformers import attention_segments, capture_attention_mass

    model, processor = tiny_model(device)
    inputs = padded_batch(processor, device)
    ids, real = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        with capture_attention_mass(model, attention_segments(ids, model, real)) as generated:
            options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **ordinary_tokens_only(processor)}
            sequences = model.generate(**inputs, **options)
        sequences = sequences[:, :-1]  # the last token is never a query
        written = torch.ones(2, sequences.shape[1] - ids.shape[1], dtype=torch.bool, device=device)
        real = torch.cat([real, written.long()], dim=1)
        with capture_attention_mass(model, attention_segments(sequences, model, real, written)) as whole:
            model(input_ids=sequences, attention_mask=real, pixel_values=inputs["pixel_values"])
    expect_equal(generated.masses, whole.masses, real.bool()[:, None, :, None], TOLERANCE)


def prove_fused_head(device: str) -> None:
    """Compare log-probabilities of the fused head with those of the model's own logits."""
    import torch

    from vgpo_trainer.fused_head import fuse_heads

    model, processor = tiny_model(device)
    inputs = padded_batch(processor, device)
    ids, real = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        logits = model(**inputs).logits[:, :-1].float() / TEMPERATURE
        expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fuse_heads((model,), TEMPERATURE, fp32=False)
        for warning in caught:
            if str(warning.message).startswith("fused_head"):  # another head would be used
                raise Failure(str(warning.message))
        found = model(**inputs, labels=ids, fused_lm_head=True).log_probs
    expect_equal(found, expected, real.bool()[:, 1:], TOLERANCE)


def prove_training_step(device: str) -> None:
    """Train for one step, and look at the weights and at the metrics that it leaves."""
    from datasets import Dataset

    from vgpo_trainer.config import VGPOTrainingConfig
    from vgpo_trainer.demo.digits import PROMPT
    from vgpo_trainer.runs.metrics import read_metrics
    from vgpo_trainer.trainer import VGPOTrainer

    def reward(completions: Sequence[Any], **_: Any) -> list[float]:
        return [float(index % 2) for index in range(len(completions))]  # differs between the answers to a prompt

    model, processor = tiny_model(device)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    rows = [{"prompt": [{"role": "user", "content": PROMPT}], "images": [image]} for image in pictures(2)]
    with tempfile.TemporaryDirectory(prefix="vgpo-doctor-") as folder:
        settings = VGPOTrainingConfig(
            output_dir=folder,
            max_steps=1,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=NEW_TOKENS,
            generation_kwargs=ordinary_tokens_only(processor),
            learning_rate=LEARNING_RATE,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=device == "cpu",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        VGPOTrainer(model, reward, settings, Dataset.from_list(rows), processing_class=processor).train()
        records = read_metrics(Path(folder) / "metrics.jsonl")
    if len(records) != 1:
        raise Failure(f"it left {len(records)} records in metrics.jsonl")
    judge_step(before, dict(model.named_parameters()), records[0])


def judge_step(before: Mapping[str, Any], after: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Raise Failure for what is wrong with a training step.

    Args:
        before: The weights before it, by name.
        after: And after it.
        record: Its record in ``metrics.jsonl``, where null (None) stands for a number that is not finite.
    """
    broken = [name for name, weight in after.items() if not bool(weight.isfinite().all())]
    if broken:
        raise Failure(f"{broken[0]} is not finite after it")
    if all(bool((weight == before[name]).all()) for name, weight in after.items()):
        raise Failure("no weight changed")
    missing = [f"vgpo/{name}" for name in VGPO_METRICS if f"vgpo/{name}" not in record]
    if missing:
        raise Failure(f"its metrics lack {', '.join(missing)}")
    finite = {name: value for name, value in record.items() if name not in UNDEFINED}
    endless = [name for name, value in finite.items() if value is None or not math.isfinite(value)]
    if endless:
        raise Failure(f"not finite: {', '.join(endless)}")
    if record["vgpo/weighted_share"] != 1:
        raise Failure(f"{record['vgpo/weighted_share']:.0%} of its responses have a visual signal, and all have images")


MODEL = ("numpy", "PIL", "transformers")
TRAINER = (*MODEL, "trl", "accelerate", "datasets")

CHECKS = (
    Check("captured hidden states are what the LM head reads", MODEL, prove_hidden_states),
    Check("attention captured in one pass equals eager's weights", MODEL, prove_attention),
    Check("attention captured in generate equals that of one pass", MODEL, prove_attention_in_generate),
    Check("log-probabilities of the fused head equal those of the logits", TRAINER, prove_fused_head),
    Check("a training step changes the weights and its metrics are finite", TRAINER, prove_training_step),
)
