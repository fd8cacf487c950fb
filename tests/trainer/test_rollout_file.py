"""Which responses of a run are stored, and that a resumed run stores none twice."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

pytest.importorskip("trl")

from trainer.test_report import rollout
from trainer.tiny_runs import make_trainer, picture, rows
from transformers import TrainerCallback
from vgpo_trainer.rollouts import RolloutSample
from vgpo_trainer.runs.folder import RunFolder
from vgpo_trainer.runs.rollouts import LONGEST_SIDE, MOST_STEPS, RolloutFile, stored_rollouts
from vgpo_trainer.runs.writing import RunFailure

torch.set_num_threads(1)


def sample(prompt="p", images=(), step=0, mode="train", scored=(True, True)):
    return RolloutSample(
        step=step,
        mode=mode,
        prompt=prompt,
        images=list(images),
        answer=None,
        tokens=["a", "b"],
        scored=list(scored),
        cos=[0.5, 0.0],
        psi=[0.1, 0.0],
        factors=[1.1, 1.0],
        phi=0.0,
        reward=1.0,
        advantage=0.5,
        late_early_ratio=1.0,
        correct=None,
    )


def test_whole_groups_are_stored_whatever_their_rows_hold(tmp_path):
    folder = RunFolder(tmp_path)
    several = [picture(1), picture(2, size=2 * LONGEST_SIDE)]
    samples = [
        sample("text"),
        sample("images", several),
        sample("text"),
        sample("images", [*map(Image.Image.copy, several)]),
    ]
    samples += [sample("alone", [picture(3)]), sample("alone", [picture(4)], scored=[True, False])]
    stored = stored_rollouts(samples, folder, groups=3, longest_side=LONGEST_SIDE)
    assert [one.prompt for one in stored] == ["text", "text", "images", "images", "alone"]
    assert stored[0].image is None and stored[0].more_images == []
    assert stored[2].group == stored[3].group and len(stored[2].more_images) == 1
    assert len(list(folder.images.iterdir())) == 3  # of the problems stored, each image once
    with Image.open(folder.images / stored[2].more_images[0]) as image:
        assert max(image.size) == LONGEST_SIDE
    folder.append_rollouts(stored)
    assert [one.group for one in folder.read_rollouts()] == [one.group for one in stored]
    (cut,) = stored_rollouts(samples[-1:], folder, groups=1)
    assert cut.cos[0] == 0.5 and cut.cos[1] != cut.cos[1]  # a token that was not scored has no signal


def run_callback(folder, steps, save_steps=10, samples=None, stop=None):
    """The callback in a run of so many steps whose trainer keeps one response of each."""
    trainer = SimpleNamespace(rollout_samples=[])
    callback = RolloutFile(trainer, folder)
    arguments = SimpleNamespace(save_strategy="steps")
    state = SimpleNamespace(global_step=0, max_steps=steps, save_steps=save_steps, is_world_process_zero=True)
    control = SimpleNamespace(should_training_stop=False)
    callback.on_train_begin(arguments, state, control)
    for step in range(steps):
        trainer.rollout_samples = [sample(step=step)] if samples is None else samples(step)
        state.global_step = step + 1
        control.should_training_stop = step + 1 == stop
        callback.on_step_end(arguments, state, control)
        if step + 1 == stop:
            break
    callback.on_train_end(arguments, state, control)
    return [one.step for one in folder.read_rollouts()]


def test_the_first_step_every_few_and_the_last(tmp_path):
    assert run_callback(RunFolder(tmp_path), 25) == [0, 9, 19, 24]
    assert run_callback(RunFolder(tmp_path), 25, stop=13) == [0, 9, 12]  # another run, another file


def test_a_long_run_stores_no_more(tmp_path):
    stored = run_callback(RunFolder(tmp_path), 1000, save_steps=1)
    assert len(stored) == MOST_STEPS + 1 and stored[:2] == [0, 24] and stored[-1] == 999


def test_responses_of_an_evaluation_are_not_those_of_a_step(tmp_path):
    def evaluated(step):
        other = [sample(step=step, mode="eval")]
        return other if step in (9, 10) else [sample(step=step), *other]

    assert run_callback(RunFolder(tmp_path), 25, samples=evaluated) == [0, 11, 19, 24]


def test_a_file_cut_short_by_a_crash_is_read_up_to_there(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append_rollouts([rollout(step=1), rollout(step=2)])
    with folder.rollouts.open("a") as file:
        file.write('{"step": 3, "prom')
    assert [one.step for one in folder.read_rollouts()] == [1, 2]
    folder.keep_rollouts(before=2)
    assert [one.step for one in folder.read_rollouts()] == [1]


class Stop(TrainerCallback):
    """Ends a run as a crash would, after the checkpoint of a step."""

    def on_save(self, args, state, control, **_):
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_a_resumed_run_stores_nothing_twice(tmp_path):
    folder = RunFolder(tmp_path)
    resume = None
    for crash in (True, False):
        trainer = make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, dataset=rows([1, 0, 2, 1]))
        trainer.add_callback(RolloutFile(trainer, folder))
        if crash:
            trainer.add_callback(Stop())
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            assert [one.step for one in folder.read_rollouts()] == [0] * 4 + [1] * 4
            folder.append_rollouts([rollout(step=2)])  # after the checkpoint, so that it will be done again
            resume = str(tmp_path / "checkpoint-2")
        else:
            trainer.train(resume_from_checkpoint=resume)
    stored = folder.read_rollouts()
    assert [one.step for one in stored] == [0] * 4 + [1] * 4 + [3] * 4
    assert all(len({one.group for one in stored[start : start + 4]}) == 1 for start in (0, 4, 8))
    assert all(len(one.tokens) == len(one.cos) == len(one.factors) > 0 for one in stored)


def test_what_is_no_file_of_rollouts_ends_a_resumed_run_in_one_line(tmp_path):
    folder = RunFolder(tmp_path)
    folder.rollouts.write_text("[]\n")
    state = SimpleNamespace(global_step=2, max_steps=4, save_steps=2, is_world_process_zero=True)
    with pytest.raises(RunFailure, match=r"rollouts.jsonl, line 1, is not a rollout"):
        RolloutFile(SimpleNamespace(), folder).on_train_begin(SimpleNamespace(save_strategy="steps"), state, None)


def test_a_sample_prints_as_a_line():
    assert repr(sample()) == "<RolloutSample: train, step 0, 'ab', 2 tokens, reward 1, advantage 0.5, phi 0>"
    long = replace(sample(), tokens=["word "] * 1000, correct=False)
    assert repr(long).endswith(", wrong>") and len(repr(long)) < 170
