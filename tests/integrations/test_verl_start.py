"""What a run of verl is refused and told before it samples, and how this library gets into verl's processes."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed (make verl installs it)")

import verl
from integrations.rollout_case import tiny_model
from integrations.verl_case import settings
from omegaconf import OmegaConf
from verl.trainer.ppo import v1

import vgpo_kernels
from vgpo_kernels import ShapingConfig, VGPOConfig
from vgpo_kernels.integrations.surface import UnknownSurfaceError, config_from
from vgpo_kernels.integrations.verl import losses, plugin, run

PAPER = {"algorithm__vgpo": {"preset": "paper"}}


def test_the_switch() -> None:
    assert run.switch(settings()) is None
    assert run.switch(settings(**PAPER)) == run.Switch(VGPOConfig.paper(), bypass=False)
    found = run.switch(settings(algorithm__vgpo={"beta": 0.5}, algorithm__rollout_correction={"bypass_mode": True}))
    assert found == run.Switch(VGPOConfig.paper(beta=0.5), bypass=True)
    found = run.switch(settings(algorithm__vgpo={"method": "vppo", "top_visual": 0.3}))
    assert found == run.Switch(ShapingConfig.vppo(top_visual=0.3), bypass=False, method="vppo")
    assert run.switch(settings(algorithm__vgpo={"method": "vgpo", "preset": "released"})) == run.Switch(
        VGPOConfig.released(), bypass=False
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"actor_rollout_ref__actor__policy_loss__loss_mode": "vgpo_gspo"},
            "loss_mode=vgpo_gspo without algo",
        ),
        (
            PAPER | {"actor_rollout_ref__actor__strategy": "torchtitan"},
            "strategy=torchtitan does not work",
        ),
        (
            PAPER | {"actor_rollout_ref__actor__strategy": "automodel"},
            "strategy=automodel does not work",
        ),
        (
            PAPER
            | {
                "actor_rollout_ref__actor__strategy": "megatron",
                "actor_rollout_ref__actor__megatron": {"dynamic_context_parallel": True},
            },
            r"megatron.dynamic_context_parallel=true, with which verl .*; context_parallel_size works",
        ),
        ({"algorithm__vgpo": {"method": "vpo"}}, "method must be one of vgpo, .*, got 'vpo'; did you mean"),
        ({"algorithm__vgpo": {"method": "papo"}}, "method='papo' is not in verl: its term of the loss .*vgpo train"),
        ({"algorithm__vgpo": {"method": "CGPO"}}, r"method='CGPO' is not in verl: .*ShapingConfig.cgpo\(\)"),
        ({"algorithm__vgpo": {"method": "va-opd"}}, "it distils a teacher"),
        ({"algorithm__vgpo": {"method": "at_rl"}}, "was not published in full"),
        ({"algorithm__vgpo": {"method": "vppo", "preset": "paper"}}, "preset is of method=vgpo"),
        ({"algorithm__vgpo": {"method": "vppo", "beta": 0.5}}, "unknown settings of method=vppo: beta"),
        ({"algorithm__vgpo": {"method": "vppo", "fusion": "soft_or"}}, "these settings need gap"),
        ({"algorithm__vgpo": {"method": "vppo", "top_visual": 2.0}}, "top_visual must"),
        (
            {
                "algorithm__vgpo": {"method": "vppo"},
                "actor_rollout_ref__actor__strategy": "megatron",
                "actor_rollout_ref__actor__megatron": {"dynamic_context_parallel": False},
            },
            "method=vppo does not work with strategy=megatron",
        ),
        (
            {
                "algorithm__vgpo": {"method": "pepo"},
                "actor_rollout_ref__actor__ulysses_sequence_parallel_size": 2,
            },
            "method=pepo does not work with ulysses_sequence_parallel_size=2",
        ),
        (
            {"algorithm__vgpo": {"method": "vepo"}, "actor_rollout_ref__model__use_fused_kernels": True},
            "method=vepo does not work with model.use_fused_kernels=true",
        ),
        (
            {"algorithm__vgpo": {"method": "vepo"}, "actor_rollout_ref__actor__loss_agg_mode": "seq-mean-token-mean"},
            "method=vepo does not work with loss_agg_mode=seq-mean-token-mean",
        ),
        (
            {"algorithm__vgpo": {"method": "vepo"}, "actor_rollout_ref__actor__policy_loss__loss_mode": "gspo"},
            "method=vepo does not work with loss_mode=gspo",
        ),
        ({"algorithm__vgpo": {"preset": "papers"}}, "preset must be paper or released"),
        ({"algorithm__vgpo": {"gamma": 0.5}}, "unknown VGPO settings: gamma"),
        (
            PAPER | {"distillation__enabled": True, "distillation__distillation_loss__use_task_rewards": False},
            "use_task_rewards=false drops the advantages",
        ),
    ],
    ids=str,
)
def test_what_is_refused_before_anything_is_loaded(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        v1.PPOTrainerSync(settings(**changes))


@pytest.mark.parametrize("file", ["ppo", "ppo_megatron", "ppo_torchtitan", "ppo_veomni"])
def test_verls_configurations_by_their_engine(file: str) -> None:
    """verl's own files of settings, one for each engine."""
    config = OmegaConf.load(Path(verl.__file__).parent / "trainer" / "config" / f"_generated_{file}_trainer.yaml")
    OmegaConf.update(config, "algorithm.vgpo", {"preset": "paper"}, force_add=True)
    strategy = config.actor_rollout_ref.actor.strategy
    if strategy in run.SCORED:
        assert run.switch(config) is not None
        return
    with pytest.raises(ValueError, match=f"strategy={strategy} does not work with algorithm.vgpo: visual focus is"):
        run.switch(config)


def worker_of(model: Any, **engine: Any) -> Any:
    part = SimpleNamespace(actor=SimpleNamespace(engine=SimpleNamespace(module=model, **engine)))
    return SimpleNamespace(worker_dict={"actor_rollout": part})


def test_a_worker_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_reweighted", False)
    worker = run.join(worker_of(tiny_model()))
    assert worker.version == vgpo_kernels.__version__
    assert worker.backend in ("cpp", "reference", "triton", "cuda")
    assert losses._reweighted


def test_a_model_without_images_is_refused_before_it_samples() -> None:
    model = tiny_model()
    del model.config.image_token_id
    with pytest.raises(ValueError, match="visual"):
        run.join(worker_of(model))
    other = torch.nn.Linear(2, 2)
    other.config = tiny_model().config
    with pytest.raises(TypeError, match="norm"):
        run.join(worker_of(other))
    flash = tiny_model()
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"method=pgpo hides images .*attn_implementation=flash_attention_2 does not"):
        run.join(worker_of(flash), "pgpo")
    flash.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="method=vepo compares distributions in the LM head, and this model's logits"):
        run.join(worker_of(flash), "vepo")
    # Megatron's, in chunks of pipeline stages.
    with pytest.raises(ValueError, match="visual"):
        run.join(worker_of([other], model_config=SimpleNamespace(hf_config=model.config)))


def test_the_banner() -> None:
    config = settings(algorithm__vgpo={"preset": "released", "beta": 0.4}, actor_rollout_ref__rollout__n=8)
    workers = [run.Worker("one", "0", "cuda"), run.Worker("two", "0", "cuda"), run.Worker("two", "0", "cuda")]
    found = run.switch(config)
    assert found is not None
    text = run.banner(config, found, workers)
    assert f"vgpo_kernels {vgpo_kernels.__version__}, verl 0.9" in text
    assert "engine fsdp; workers: 3, nodes: 2, kernels: cuda" in text
    assert "visual focus, in the old-log-prob pass; groups by uid, 8 responses each" in text
    assert "preset released, beta=0.4; loss_mode vanilla" in text


def test_the_banner_of_another_method() -> None:
    workers = [run.Worker("one", "0", "cuda")]

    def text(**settings_of_vgpo: Any) -> str:
        config = settings(algorithm__vgpo=settings_of_vgpo, actor_rollout_ref__rollout__n=8)
        found = run.switch(config)
        assert found is not None
        return run.banner(config, found, workers)

    said = text(method="vppo", top_visual=0.3)
    assert "k3 of the sampled token, patches of the image masked (0.5), in the old-log-prob pass and one more;" in said
    assert "method vppo, top_visual=0.3; loss_mode vanilla" in said
    assert "over all layers and entropy, in the old-log-prob pass; groups" in text(method="pepo")


PRINT = """
import logging, sys, warnings
warnings.simplefilter("ignore")
import verl
loaded = [name for name in sys.modules if name.startswith("verl.trainer") or name.startswith("verl.workers")]
assert not loaded, loaded
from verl.trainer.ppo import core_algos
print("registered", "vgpo" in core_algos.POLICY_LOSS_REGISTRY)
"""


@pytest.mark.parametrize(
    ("policy", "modules", "registered"),
    [
        ("auto", "", True),
        pytest.param("none", "vgpo_kernels.integrations.verl", True, marks=pytest.mark.slow),
        pytest.param("none", "", False, marks=pytest.mark.slow),
    ],
)
def test_verl_finds_the_plugin(policy: str, modules: str, registered: bool) -> None:
    """By its entry point or by name, and without importing a trainer or an engine."""
    if policy == "auto" and not [one for one in entry_points(group="verl.plugins") if one.name == "vgpo"]:
        pytest.skip("this library is on the path, but not installed")
    environment = os.environ | {"VERL_USE_EXTERNAL_PLUGINS": policy, "VERL_USE_EXTERNAL_MODULES": modules}
    command = [sys.executable, "-c", PRINT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"registered {registered}" in done.stdout


def test_another_verl_is_refused_where_vgpo_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = ModuleType("verl.trainer.ppo.core_algos")
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "")
    monkeypatch.setattr(run, "unknown", [])
    plugin._change(other)
    said = "VGPO does not know this verl, so it refuses algorithm.vgpo: verl.trainer.ppo.core_algos has no"
    assert said in caplog.text
    with pytest.raises(UnknownSurfaceError, match=r"core_algos has no register_policy_loss"):
        run.join(worker_of(tiny_model()))

    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "mine,vgpo_kernels.integrations.verl")
    with pytest.raises(UnknownSurfaceError, match=r"has no register_policy_loss: this adapter knows verl 0\.9"):
        plugin._change(other)


def test_a_trainer_that_is_known_in_part_refuses_vgpo(monkeypatch: pytest.MonkeyPatch) -> None:
    class PPOTrainer(v1.PPOTrainerSync):
        def _compute_advantage(self, data: Any) -> Any:  # type: ignore[override]
            return data

    other = ModuleType("verl.trainer.ppo.v1.trainer_base")
    other.PPOTrainer = PPOTrainer  # type: ignore[attr-defined]
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "")
    monkeypatch.setattr(run, "unknown", [])
    plugin._change(other)
    with pytest.raises(UnknownSurfaceError, match=r"PPOTrainer._compute_advantage takes \(self, data\), not batch"):
        PPOTrainer(settings(**PAPER))
    assert PPOTrainer(settings()).vgpo is None


@pytest.mark.parametrize("name", sorted(plugin.CHANGES))
def test_a_verl_without_what_is_changed_stays_importable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "")
    monkeypatch.setattr(run, "unknown", [])
    plugin._change(ModuleType(name))
    assert len(run.unknown) == 1
    assert f"{name} has no" in str(run.unknown[0])


def test_finders_of_old_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python itself does with those that have no find_spec."""
    monkeypatch.setattr(sys, "meta_path", [object(), *sys.meta_path])
    name, package = "verl.trainer.ppo.core_algos", sys.modules["verl.trainer.ppo"]
    found = plugin._Finder().find_spec(name, list(package.__path__))
    assert found is not None
    assert found.origin == sys.modules[name].__file__


def test_attaching_again_changes_nothing() -> None:
    advantage, count = v1.PPOTrainer._compute_advantage, len(sys.meta_path)
    plugin.attach()
    for name, change in plugin.CHANGES.items():
        if name in sys.modules:
            change(sys.modules[name])
    assert v1.PPOTrainer._compute_advantage is advantage
    assert len(sys.meta_path) == count


def test_settings_come_from_a_mapping() -> None:
    assert config_from({}) == VGPOConfig.paper()
    released = VGPOConfig.released()
    assert config_from({"preset": "released", "intra_clamp": [0.5, 1.5]}).intra_clamp == (0.5, 1.5)
    for none in ([], (), None):
        assert config_from({"preset": "released", "intra_clamp": none}).intra_clamp is None
    # As verl hands its settings over.
    given = OmegaConf.create({"preset": "released", "intra_clamp": [], "inter_clamp": [0.5, 1.5]})
    found = config_from(given)
    assert (found.intra_clamp, found.inter_clamp, found.beta) == (None, (0.5, 1.5), released.beta)
