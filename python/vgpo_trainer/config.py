"""The settings of a training run: TRL's, and those of the visual signal."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Self

from trl import GRPOConfig

from vgpo_kernels import ShapingConfig, VGPOConfig
from vgpo_trainer.methods import METHODS, compares_responses, known_method
from vgpo_trainer.signals import BLIND, SIGNALS, VIEWS, ViewSignal, signal_class

PRESETS = ("paper", "released")
SOURCES = ("auto", "scoring", "loss")
VIEW_ESTIMATORS = ("exact", "k3")


@dataclass
class VGPOTrainingConfig(GRPOConfig):
    """:class:`trl.GRPOConfig` with the settings of VGPO; everything else keeps TRL's meaning and defaults.

    Two defaults differ from TRL's: ``logging_steps`` is 1, so that every optimisation step leaves a record, and
    ``vgpo`` is on.

    Args:
        method: What the visual signal does to the loss, a name of :data:`vgpo_trainer.methods.METHODS`: ``"vgpo"``
            (default), ``"pepo"``, ``"vppo"``, ``"pgpo"``, ``"tor"``, ``"vepo"`` or ``"papo"``. Each brings its signal,
            its view and its settings. docs/methods.md has what they do and cost.
        method_kwargs: Fields of :class:`vgpo_kernels.ShapingConfig` that differ from the preset of a method beside
            VGPO: ``{"top_visual": 0.3}``.
        vgpo: Preset of :class:`vgpo_kernels.VGPOConfig`, for ``method="vgpo"``: ``"paper"``, ``"released"``, or
            ``None`` (``"none"``), which trains without the visual signal and gives TRL's own loss.
        signal: The visual signal, a name of :data:`vgpo_trainer.signals.SIGNALS`; default: the method's, and of VGPO
            ``"focus"``, the cosine of a token's hidden state to its image prototype. VGPO takes each of them in its
            place: ``"attention"``, its query's share of attention on the image; ``"dependency"``, the divergence of its
            distribution from that under a spoilt ``view`` of the image; ``"similarity"``, ``"k3"``, ``"logp_change"``
            and ``"js"``, those of other methods.
        signal_layers: Layers that are averaged, negative ones counted from the last; default: all. Of ``"attention"``
            decoder layers, of ``"similarity"`` the ``hidden_states`` that transformers would return.
        vgpo_signal: The forward pass in which the visual signal is read.

            - ``"loss"``: the forward pass of the loss. It costs nothing. But the responses of a prompt are compared
              with each other, so all of them must be in the same micro-batch (over all processes). This needs
              ``steps_per_generation=1`` and ``num_iterations=1``, unless ``vgpo_inter=False`` and the score needs no
              offset of the batch.
            - ``"scoring"``: a forward pass without gradient over the whole generation batch, before its first
              micro-batch. Where TRL computes old log-probabilities (vLLM, ``num_iterations > 1``, generations kept for
              several optimisation steps), it is that pass and costs nothing more. Elsewhere it is one more pass of the
              decoder: about a third of the cost of the loss and its gradient, and nothing is generated again.
            - ``"auto"`` (default): ``"loss"`` where it gives the same factors, else ``"scoring"``.

            A signal that compares two views has in each of these passes one of the spoilt view before it, a slice at a
            time: the decoder without its LM head and without gradient.
        view: How images are spoilt, for signals that compare two views and for ``view_coef``: a kind of
            :func:`vgpo_kernels.integrations.transformers.spoilt_view`. ``"swap"`` shows a row an image of
            another prompt in this process's generation batch; ``"mask"``, ``"noise"``, ``"pixelation"`` and
            ``"blank"`` spoil its own; ``"none"`` shows none. With ``"blind"`` text does not attend to the images
            (:func:`~vgpo_kernels.integrations.transformers.blind_attention`). Default: the method's, and of VGPO
            ``"swap"``. What is random comes from ``seed`` and the step. Dropout differs between the two passes and
            counts as dependency; train without it.
        view_strength: Of the kinds that have one; default: the method's, where the view is, else that of the kind.
        view_coef: Weight of the term ``-view_coef * KL(with the image || with the spoilt one)`` of the loss, as in PAPO
            (arXiv 2507.06448): what is maximised is how much a response depends on its image. Aggregated as the policy
            loss is. It needs a pass of the spoilt view with gradient, beside any method. Default: the method's, of
            ``"papo"`` 0.01, of others 0.
        view_estimator: ``"exact"``: that divergence, over the whole vocabulary. ``"k3"``: PAPO's estimate of
            it from the sampled token, log-ratios bounded by +-20 and values by 10. Default: the method's, of ``"papo"``
            k3, of others exact.
        view_clamp: Largest value of a token, in nats; beyond it a token has no gradient. Default: no bound.
        view_detach: No gradient goes through the spoilt view, neither to its states nor to the head, as in PAPO's code
            unless told otherwise. Its pass then costs no backward. Default: only with ``"papo"``.
        fused_head: Compute log-probabilities and entropies by :func:`vgpo_kernels.linear_logprob`, from hidden states
            and the LM head without all logits. A few tokens are compared with the model's own logits at the start;
            where they differ, TRL's own head or all logits are used, with a warning.
        vgpo_diagnostics: Compute and log the visual signal although ``vgpo`` is ``None``; the loss does not change.
        rollout_samples: How many of the latest responses ``VGPOTrainer.rollout_samples`` keeps; 0 keeps none.
        vgpo_beta: As in :class:`vgpo_kernels.VGPOConfig`, like the fields that follow. ``None`` keeps the preset's.
        vgpo_intra_clamp: A pair ``[low, high]``; an empty list removes the preset's clamp. ``vgpo_inter_clamp`` alike.

    Raises:
        ValueError: An unknown method, preset, signal or source, a setting out of range, a setting of VGPO beside
            ``vgpo=None`` or another method, or a signal that is not the method's.
        TypeError: ``method`` or ``vgpo`` is no text, or ``method_kwargs`` no dict.

    """

    # As transformers has it; an annotation would make it a setting to those who list them.
    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "method_kwargs"]  # noqa: RUF012

    logging_steps: float = field(default=1, metadata={"help": "Log every this many optimisation steps."})

    method: str = field(
        default="vgpo",
        metadata={"help": "What the visual signal does to the loss: vgpo, pepo, vppo, pgpo, tor, vepo or papo."},
    )
    method_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Fields of ShapingConfig that differ from those of a method beside vgpo."},
    )
    vgpo: str | None = field(default="paper", metadata={"help": "Preset: paper, released or none."})
    signal: str | None = field(
        default=None,
        metadata={
            "help": "Visual signal: focus, attention, dependency, similarity, k3, logp_change or js; default: the "
            "method's, of vgpo focus."
        },
    )
    signal_layers: list[int] | None = field(
        default=None, metadata={"help": "Layers whose attention or similarity counts."}
    )
    vgpo_signal: str = field(
        default="auto", metadata={"help": "Forward pass that the signal is read in: auto, scoring or loss."}
    )
    view: str | None = field(
        default=None,
        metadata={
            "help": "How images are spoilt: swap, mask, noise, pixelation, blank, none or blind; default: the "
            "method's, of vgpo swap."
        },
    )
    view_strength: float | None = field(default=None, metadata={"help": "Strength of mask, noise or pixelation."})
    view_coef: float | None = field(
        default=None, metadata={"help": "Weight of PAPO's term: divergence of a spoilt view; default: the method's."}
    )
    view_estimator: str | None = field(
        default=None, metadata={"help": "Its divergence: exact, or k3 of sampled tokens; default: exact, of papo k3."}
    )
    view_clamp: float | None = field(default=None, metadata={"help": "Its largest value of a token, in nats."})
    view_detach: bool | None = field(
        default=None, metadata={"help": "Leave the spoilt view out of its gradient; default: only with papo."}
    )
    fused_head: bool = field(default=True, metadata={"help": "Log-probabilities by linear_logprob, without logits."})
    vgpo_diagnostics: bool = field(
        default=False, metadata={"help": "Log the visual signal even without VGPO; the loss does not change."}
    )
    rollout_samples: int = field(default=64, metadata={"help": "How many of the latest responses to keep."})

    vgpo_beta: float | None = field(default=None, metadata={"help": "Strength of the compensation."})
    vgpo_tail_ratio: float | None = field(default=None, metadata={"help": "Share of a response that is its tail."})
    vgpo_top_ratio: float | None = field(default=None, metadata={"help": "Share of the tail that passes the gate."})
    vgpo_schedule: str | None = field(default=None, metadata={"help": "linear, exponential or step."})
    vgpo_start_ratio: float | None = field(default=None, metadata={"help": "Position where compensation starts."})
    vgpo_exponent: float | None = field(default=None, metadata={"help": "Exponent of the exponential schedule."})
    vgpo_step_ratio: float | None = field(default=None, metadata={"help": "Position of the step schedule."})
    vgpo_gate: bool | None = field(default=None, metadata={"help": "Compensate only the tail's strongest tokens."})
    vgpo_intra: bool | None = field(default=None, metadata={"help": "Re-weight the tokens of a response."})
    vgpo_inter: bool | None = field(default=None, metadata={"help": "Re-weight the responses of a prompt."})
    vgpo_score: str | None = field(default=None, metadata={"help": "affine or offset."})
    vgpo_score_offset: float | None = field(
        default=None, metadata={"help": "The offset; default: the rollout batch's."}
    )
    vgpo_position: str | None = field(default=None, metadata={"help": "one_based or zero_based."})
    vgpo_accumulation: str | None = field(default=None, metadata={"help": "compensated, normalized or mean."})
    vgpo_intra_clamp: list[float] | None = field(default=None, metadata={"help": "Range of the token factor."})
    vgpo_inter_clamp: list[float] | None = field(default=None, metadata={"help": "Range of the trajectory factor."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check()

    @classmethod
    def from_trl(cls, args: GRPOConfig, **settings: Any) -> Self:
        """Return the settings of TRL with those of VGPO added.

        Everything that ``args`` holds is carried over as it is, ``logging_steps`` and what TRL has worked out
        (``generation_batch_size``, ``steps_per_generation``, devices) included; ``args`` does not change.

        Args:
            args: TRL's settings.
            **settings: Fields of this class that GRPOConfig does not have; the others keep their defaults.

        Raises:
            TypeError: ``args`` is no :class:`trl.GRPOConfig`, or of a subclass, whose additions would be lost, or has
                VGPO's settings already; or a setting is none of VGPO's.
            ValueError: As for the class itself.

        """
        if isinstance(args, VGPOTrainingConfig):
            raise TypeError(
                f"args is a {type(args).__name__}, which has VGPO's settings: use it as it is; from_trl takes a plain "
                "trl.GRPOConfig"
            )
        if type(args) is not GRPOConfig:
            raise TypeError(
                f"args must be a VGPOTrainingConfig, or a plain trl.GRPOConfig, got {type(args).__name__}; "
                "a class of your own can be derived from VGPOTrainingConfig"
            )
        inherited = {setting.name for setting in fields(GRPOConfig)}
        own = {setting.name: setting.default for setting in fields(cls) if setting.name not in inherited}
        assert MISSING not in own.values()
        unknown = ", ".join(settings.keys() - own.keys())
        if unknown:
            raise TypeError(f"{unknown}: no setting of VGPO; set TRL's in the GRPOConfig")
        # Not by the constructor, which refuses settings that it has worked out itself.
        made = cls.__new__(cls)
        made.__dict__.update(vars(args) | own | settings)
        made._check()
        return made

    def _check(self) -> None:
        """Raise ValueError for settings of VGPO that are out of range or do not go together."""
        if self.vgpo is not None and not isinstance(self.vgpo, str):
            raise TypeError(
                f"vgpo must be the name of a preset, {' or '.join(PRESETS)}, or None, got {type(self.vgpo).__name__}; "
                "what differs from the preset goes to vgpo_beta, vgpo_top_ratio, ..."
            )
        if self.vgpo is not None and self.vgpo.lower() == "none":
            self.vgpo = None
        if self.vgpo is not None and self.vgpo not in PRESETS:
            raise ValueError(f"vgpo must be one of {', '.join(PRESETS)} or None, got {self.vgpo!r}")
        if self.vgpo_signal not in SOURCES:
            raise ValueError(f"vgpo_signal must be one of {', '.join(SOURCES)}, got {self.vgpo_signal!r}")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be above 0, got {self.temperature}: the responses of a group have to differ"
            )
        if self.rollout_samples < 0:
            raise ValueError(f"rollout_samples must not be negative, got {self.rollout_samples}")
        self._check_method()

    def replacing(self, **settings: str | None) -> VGPOTrainingConfig:
        """Return a copy with the settings of the method and its signal that are not ``None``, checked."""
        told = {name: value for name, value in settings.items() if value is not None}
        if not told:
            return self
        other = copy(self)
        if other.method != told.get("method", other.method):
            other.method_kwargs = None
        # What was left to the method is left to the new one.
        left = [name for name, value in self.of_method().items() if getattr(self, name) == value]
        vars(other).update({name: _DEFAULTS[name] for name in left} | told)
        other._check_method()
        return other

    def of_method(self) -> dict[str, Any]:
        """Return what settings that are left to the method are."""
        method = known_method(self.method)
        view = method.view or "swap"
        return {
            "signal": method.signal or "focus",
            "view": view,
            "view_strength": method.strength if self.view in (None, view) else None,
            "view_coef": method.view_coef,
            "view_estimator": method.view_estimator,
            "view_detach": method.view_detach,
        }

    def _check_method(self) -> None:
        """Raise ValueError for settings of a method that do not go together, and fill in what is left to it."""
        settled = self.of_method()
        method, name = METHODS[self.method], self.method
        changes = self._changes()
        told = [f"vgpo_{change}" for change in changes] + ["vgpo"] * (self.vgpo not in ("paper", None))
        if name != "vgpo" and told:
            raise ValueError(f"{', '.join(told)} has no effect with method={name!r}; method_kwargs has its settings")
        if method.weighs and name != "vgpo" and self.vgpo is None:
            raise ValueError(
                f"vgpo=None trains without the visual signal, which method={name!r} is made of: leave out one"
            )
        if self.vgpo is None and changes:
            raise ValueError(f"{', '.join(told)} has no effect with vgpo=None; name a preset or leave it out")
        if self.method_kwargs is not None and not isinstance(self.method_kwargs, dict):
            raise TypeError(f"method_kwargs must be a dict, or a JSON object as text, got {self.method_kwargs!r}")
        if self.method_kwargs and (name == "vgpo" or not method.weighs):
            instead = "vgpo_beta and the like change VGPO's settings" if name == "vgpo" else "view_coef is its setting"
            raise ValueError(f"method_kwargs has no effect with method={name!r}; {instead}")
        if method.signal is not None and self.signal not in (None, method.signal):
            raise ValueError(
                f"signal={self.signal!r} does not go with method={name!r}, whose signal is {method.signal!r}; "
                "method='vgpo' takes any signal"
            )
        vars(self).update({key: value for key, value in settled.items() if getattr(self, key) == _DEFAULTS[key]})
        self._check_signal()
        try:
            shaping = self.shaping()
        except TypeError as error:
            raise ValueError(f"method_kwargs: {error}") from None
        if method.over_selected and isinstance(shaping, ShapingConfig) and shaping.scope != "response":
            raise ValueError(
                f"method_kwargs has scope={shaping.scope!r}, and method={name!r} divides by the number of selected "
                "tokens, which is known before they are only where each response selects its own: scope='response'"
            )
        if self.vgpo_signal == "loss" and not self._loss_signal_is_exact():
            raise ValueError(
                "vgpo_signal='loss' needs the whole generation batch in one micro-batch, used once: "
                f"steps_per_generation=1 and num_iterations=1, got {self.steps_per_generation} and "
                f"{self.num_iterations}; vgpo_signal='auto' pays for a pass of its own only where it has to"
            )

    def _check_signal(self) -> None:
        """Raise ValueError for a signal that does not exist, or layers that it does not read."""
        assert self.signal is not None
        reads_layers = signal_class(self.signal).reads_layers
        if self.signal_layers is not None and not reads_layers:
            readers = " or ".join(repr(name) for name in SIGNALS if signal_class(name).reads_layers)
            raise ValueError(f"signal_layers has no effect with signal={self.signal!r}; it belongs to {readers}")
        self._check_views()

    def _check_views(self) -> None:
        """Raise ValueError for settings of views that are out of range, or that nothing uses."""
        for name, known in {"view": (*VIEWS, BLIND), "view_estimator": VIEW_ESTIMATORS}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        assert self.view_coef is not None
        if not 0 <= self.view_coef < math.inf:
            raise ValueError(f"view_coef must be finite and not negative, got {self.view_coef}")
        if self.view_clamp is not None and not self.view_clamp > 0:
            raise ValueError(f"view_clamp must be positive, got {self.view_clamp}")
        settled = self.of_method()
        names = ("view", "view_strength", "view_estimator", "view_clamp", "view_detach")
        changed = [name for name in names if getattr(self, name) != settled.get(name)]
        of_term = [name for name in changed if name in ("view_estimator", "view_clamp", "view_detach")]
        if of_term and not self.view_coef:
            raise ValueError(f"{of_term[0]} has no effect with view_coef=0")
        if changed and not self.passes_views():
            raise ValueError(f"{changed[0]} has no effect with signal={self.signal!r} and view_coef=0")

    def weighs(self) -> bool:
        """Whether advantages are multiplied by factors that the visual signal gives."""
        return self.vgpo is not None and METHODS[self.method].weighs

    def reads_signal(self) -> bool:
        """Whether the visual signal is computed, for the loss or to be looked at."""
        return self.weighs() or self.vgpo_diagnostics

    def passes_views(self) -> bool:
        """Whether batches pass the policy in two views, for the signal or for the loss."""
        assert self.signal is not None
        return bool(self.view_coef) or (self.reads_signal() and issubclass(signal_class(self.signal), ViewSignal))

    def shaping(self) -> VGPOConfig | ShapingConfig | None:
        """Return how the visual signal becomes factors: the method's preset, with the changes made to it.

        ``None`` where it does not.
        """
        if self.method == "vgpo" or not self.weighs():
            return self.vgpo_config()
        assert not isinstance(self.method_kwargs, str)
        return ShapingConfig.preset(self.method, **(self.method_kwargs or {}))

    def vgpo_config(self) -> VGPOConfig | None:
        """Return the settings of VGPO: the preset with the changes made to it; ``None`` without VGPO."""
        if self.vgpo is None or self.method != "vgpo":
            return None
        preset = VGPOConfig.paper if self.vgpo == "paper" else VGPOConfig.released
        return preset(**self._changes())

    def signal_source(self) -> str:
        """Return where the hidden states of a training batch come from: ``"loss"`` or ``"scoring"``."""
        if self.vgpo_signal != "auto":
            return self.vgpo_signal
        return "loss" if not self.scores_anyway() and self._loss_signal_is_exact() else "scoring"

    def scores_anyway(self) -> bool:
        """Whether TRL computes old log-probabilities, by a pass that a signal can be read from."""
        uses = self.steps_per_generation * self.num_iterations
        corrects = self.use_vllm and self.vllm_importance_sampling_correction
        return bool(self.gradient_accumulation_steps % uses != 0 or corrects)

    def _loss_signal_is_exact(self) -> bool:
        """Whether a micro-batch, over all processes, holds everything that its responses are compared with."""
        alone = not compares_responses(self.shaping() or VGPOConfig.paper())
        return bool(self.num_iterations == 1 and (alone or self.steps_per_generation == 1))

    def _changes(self) -> dict[str, Any]:
        """Fields of VGPOConfig that differ from the preset, by their names there."""
        changes = {}
        for setting in fields(VGPOConfig):
            value = getattr(self, f"vgpo_{setting.name}")
            if value is None:
                continue
            if setting.name.endswith("_clamp"):
                value = tuple(value) or None
            changes[setting.name] = value
        return changes


# Of the settings that may be left to the method, those that say so.
_DEFAULTS = {setting.name: setting.default for setting in fields(VGPOTrainingConfig)}
