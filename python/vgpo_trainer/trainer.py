"""VGPOTrainer: TRL's GRPOTrainer with the visual signal in its loss.

Rollouts, generation, rewards, advantages, logging, checkpoints, accelerate and LoRA are TRL's. Ours are three
things: the visual focus of every response token, the factors that follow from it, and the loss that applies them::

    trainer = VGPOTrainer(model, reward_funcs, args=VGPOTrainingConfig(output_dir="run"), train_dataset=dataset)
    trainer.train()

**What a step leaves behind.** With ``logging_steps=1`` (the default) every optimisation step appends one JSON object
to ``<output_dir>/metrics.jsonl``. It is TRL's own log record with ``step`` and ``seconds`` (since the start of
training) added. TRL's keys keep their names: ``loss``, ``reward``, ``reward_std``, ``rewards/<function>/mean``,
``completions/mean_length``, ``entropy``, ``kl`` (with ``beta > 0``), ``grad_norm``, ``learning_rate``, ``step_time``.
Ours:

==========================  ==========================================================================================
``vgpo/visual_focus``       mean cosine of response tokens to their image prototype
``vgpo/gate_rate``          share of those tokens that the gate lets through
``vgpo/late_early_ratio``   visual focus of a response's second half over its first
``vgpo/psi_std``            standard deviation of the token weights psi
``vgpo/phi_std``            standard deviation of the trajectory weights phi
``vgpo/weighted_share``     share of responses that have an image (and finite hidden states)
``vgpo/factor_min``, ``_mean``, ``_max``  the factors (1 + psi) (1 + phi) that multiply advantages
``clip_ratio/low_mean``, ``clip_ratio/high_mean``, ``clip_ratio/region_mean``  shares of clipped tokens
``accuracy``                if a reward function reports it with TRL's ``log_metric("accuracy", value)``
==========================  ==========================================================================================

Records of an evaluation have the same keys with the prefix ``eval_``.

**Rollouts for a report.** ``trainer.rollout_samples`` is a bounded list (``args.rollout_samples``) of
:class:`~vgpo_trainer.rollouts.RolloutSample`: prompt, images, tokens, per-token cosine, psi and factor, phi, reward,
advantage, late/early ratio, and ``correct`` where a reward function reports it with ``log_extra("correct", [...])``.
"""
