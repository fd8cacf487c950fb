"""``vgpo probe``: which visual signal of a model says where its answers depend on the image, before any training."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vgpo_trainer.options.arguments import add_data_arguments, indices, natural, positive, source_of, tell_skipped
from vgpo_trainer.runs.writing import first_line, writing

if TYPE_CHECKING:
    from vgpo_trainer.probe import Findings, ProbeSettings

DESCRIPTION = (
    "Sample answers of a model, and measure which of its visual signals find the tokens that depend on the image: "
    "focus, attention, divergences and entropy, at the token and one position earlier. Nothing is trained."
)
VIEWS = ("swap", "blank", "noise")  # of vgpo_trainer.probe, which takes seconds to import


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``vgpo probe`` to a parser."""
    add = parser.add_argument
    add("--model", required=True, metavar="ID_OR_PATH", help="vision-language model: hub id or folder")
    add_data_arguments(parser)
    add("--out", type=Path, default=Path("probe"), metavar="DIR", help="folder of the results (default: %(default)s)")
    add(
        "--view",
        choices=VIEWS,
        default="swap",
        help="what the image is replaced by: another row's image, a blank one, noise (default: %(default)s)",
    )
    add(
        "--reward",
        metavar="NAME",
        help="reward function, by one of the names that vgpo train takes; default: 1 for the right answer, else 0",
    )
    add("--vgpo", choices=("paper", "released"), default="paper", help="preset of psi and phi (default: %(default)s)")
    add("--prompts", type=positive, default=64, metavar="N", help="prompts, drawn at random (default: %(default)s)")
    add("--generations", type=positive, default=4, metavar="N", help="answers to each (default: %(default)s)")
    add("--max-new-tokens", type=positive, default=256, metavar="N", help="tokens an answer (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="of sampling (default: %(default)s)")
    add("--batch-size", type=positive, default=16, metavar="N", help="answers a pass (default: %(default)s)")
    add(
        "--layers",
        type=indices,
        metavar="I,J,...",
        help="decoder layers whose attention is averaged, negative ones from the last; default: all",
    )
    add("--top", type=float, default=0.2, metavar="SHARE", help="tokens that count as dependent (default: %(default)s)")
    add(
        "--gradient",
        action="store_true",
        help="compare the gradients of weightings, too; for small models, and with hundreds of prompts",
    )
    add("--seed", type=natural, default=0, help="(default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Probe as ``arguments`` say: 0 when done, 2 for what cannot be probed."""
    from safetensors import SafetensorError

    from vgpo_kernels.integrations.surface import UnknownSurfaceError

    try:
        found = probe(arguments)
    except ModuleNotFoundError:
        raise  # told by the vgpo command, with the extra that brings it
    except (OSError, ValueError, TypeError, ImportError, UnknownSurfaceError, SafetensorError) as error:
        print(f"vgpo probe: {first_line(error)}", file=sys.stderr)
        return 2
    for sentence in found.verdict:
        print(f"- {sentence}")
    print(f"{arguments.out / 'probe.html'}\n{arguments.out / 'probe.json'}")
    return 0


def probe(arguments: argparse.Namespace) -> Findings:
    """Probe, and write ``probe.json`` and ``probe.html``.

    Raises:
        ValueError: An option, a dataset or a model that does not do.
        OSError: The model cannot be read.
        RunFailure: The results cannot be written.
    """
    from vgpo_trainer.data import load_rows
    from vgpo_trainer.rewards import exact_answer, load_reward

    reward = exact_answer if arguments.reward is None else load_reward(arguments.reward)
    rows = load_rows(source_of(arguments))
    tell_skipped(rows.skipped)

    from vgpo_trainer.commands.inspect import load_model
    from vgpo_trainer.probe import Questions, probe_model
    from vgpo_trainer.reports.probe import write_page

    settings = settings_of(arguments)
    model, processor = load_model(arguments.model)
    found, asked = probe_model(
        model,
        processor,
        Questions.of(rows.dataset, settings.prompts, settings.seed),
        settings,
        reward=reward,
        name=arguments.model,
        dataset=arguments.dataset,
    )
    with writing(arguments.out):
        arguments.out.mkdir(parents=True, exist_ok=True)
    found.write(arguments.out / "probe.json")
    write_page(found, [question.images[0] for question in asked], arguments.out / "probe.html")
    return found


def settings_of(arguments: argparse.Namespace) -> ProbeSettings:
    """Translate the options to the settings of a probe."""
    from vgpo_kernels import VGPOConfig
    from vgpo_trainer.probe import ProbeSettings

    preset = VGPOConfig.paper if arguments.vgpo == "paper" else VGPOConfig.released
    return ProbeSettings(
        view=arguments.view,
        prompts=arguments.prompts,
        generations=arguments.generations,
        temperature=arguments.temperature,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        layers=arguments.layers,
        top=arguments.top,
        gradient=arguments.gradient,
        seed=arguments.seed,
        vgpo=preset(),
    )
