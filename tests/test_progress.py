"""The warning where DPO unlearns the chosen answers."""

import logging
from types import SimpleNamespace

import pytest

from tests.test_trainer import make_trainer, pairs  # noqa: F401
from train.llava_hound_dpo.progress import WatchChosen


def watch(caplog, logs, zero=True, of="chosen"):
    """The warnings of a run with these (log-prob of chosen under the policy, under the reference)."""
    watching = WatchChosen()
    with caplog.at_level(logging.WARNING):
        for step, (policy, reference) in enumerate(logs, start=1):
            state = SimpleNamespace(is_world_process_zero=zero, global_step=step)
            found = {f"logps/{of}": policy, f"reference/{of}": reference}
            watching.on_log(None, state, None, logs=found)
    return [record.getMessage() for record in caplog.records]


def test_it_warns_once_with_both_numbers_and_the_remedy(caplog):
    found = watch(caplog, [(-1.0, -1.0)] * 3 + [(-3.0, -1.0)] * 9)
    assert len(found) == 1
    assert found[0].startswith(
        "step 6: the chosen answers have become much less likely (mean log-prob -2.20, reference -1.00)"
    )
    assert "--gamma" in found[0]


def test_the_end_of_answers_is_watched_by_itself(caplog):
    """Certain at first; the line comes as soon as five logs say in the mean that it is no longer."""
    found = watch(caplog, [(-0.01, -0.01)] * 4 + [(-0.7, -0.01)] * 9, of="chosen_end")
    assert len(found) == 1
    assert found[0].startswith("step 8: the end of the chosen answers has become much less likely")
    assert "-0.56, reference -0.01" in found[0] and "--answer_end" in found[0]


@pytest.mark.parametrize(
    "logs",
    [
        [(-9.0, -1.0)] * 4,  # too few logs to judge by
        [(-1.9, -1.0)] * 9,  # not doubled
        [(-0.4, -0.1)] * 9,  # doubled, but still all but certain
        [(-90.0, -60.0)] * 9,  # a long answer: half as much again is usual
        [(-0.5, -1.0)] * 9,  # more likely
        [(-1.0, -1.0)] * 4 + [(-5.0, -1.0)],  # one log's noise
    ],
)
def test_it_is_silent_otherwise(caplog, logs):
    assert watch(caplog, logs) == []


def test_one_process_speaks_and_logs_without_rewards_count_for_nothing(caplog):
    assert watch(caplog, [(-3.0, -1.0)] * 9, zero=False) == []
    state = SimpleNamespace(is_world_process_zero=True, global_step=1)
    for logs in (None, {}, {"loss": 1.0}, {"logps/chosen": -9.0, "losses/sft": 1.0}, {"eval_logps/chosen": -9.0}):
        WatchChosen().on_log(None, state, None, logs=logs)


def test_a_training_is_watched_against_its_own_reference(make_trainer):  # noqa: F811
    trainer = make_trainer("--beta", "0.3", "--learning_rate", "1e-2", "--max_steps", "3", "--save_strategy", "no")
    trainer.train()
    watching = next(c for c in trainer.callback_handler.callbacks if isinstance(c, WatchChosen))
    logs = [log for log in trainer.state.log_history if "rewards/chosen" in log]
    assert len(logs) == 3 and not watching.has_warned
    rises = [policy - reference for policy, reference in watching.found["chosen"]]
    assert rises == pytest.approx([log["rewards/chosen"] / 0.3 for log in logs], abs=1e-5)
    for found in watching.found.values():
        assert found[0][0] == found[0][1] and found[2][0] != found[2][1]


def test_without_a_terminal_a_step_is_a_line_and_no_bar_is_drawn(make_trainer, capsys):  # noqa: F811
    evaluated = ("--eval_split", "0.3", "--eval_strategy", "steps")
    trainer = make_trainer("--max_steps", "2", "--save_strategy", "no", *evaluated)
    capsys.readouterr()
    trainer.train()
    said = capsys.readouterr()
    assert "\r" not in said.out + said.err
    steps = [line.split("  ")[0] for line in said.out.splitlines() if "step" in line]
    assert steps == ["step 1/2", "evaluation at step 1", "step 2/2", "evaluation at step 2"]
