"""Who may train in a folder: one at a time, and nobody in one that is finished."""

from types import SimpleNamespace

import pytest

from llava.attention import layer_range
from llava.run_folder import only_writer
from tests.test_arguments import parsed
from train.llava_hound_dpo import run_dpo
from train.llava_hound_dpo.arguments import LossArguments, TrainArguments
from train.llava_hound_dpo.checkpoints import is_finished, mark_complete
from train.llava_hound_dpo.data import Pair


def test_a_finished_training_is_known_and_another_is_refused(tmp_path):
    assert not is_finished(tmp_path, {"beta": 0.1})
    mark_complete(tmp_path, {"beta": 0.1, "heads": {1: (0, 3)}})
    assert is_finished(tmp_path, {"beta": 0.1, "heads": {1: (0, 3)}})
    with pytest.raises(ValueError, match=r"of another run \(beta 0\.1 there, 0\.2 here\): choose another --output_dir"):
        is_finished(tmp_path, {"beta": 0.2, "heads": {1: (0, 3)}})


def test_a_second_training_in_a_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("llava.run_folder.PATIENCE_S", 0.1)
    model, data, _, args = parsed("--output_dir", str(tmp_path))
    with only_writer(tmp_path / "training"):
        with pytest.raises(ValueError, match="another process is writing there"):
            run_dpo.claim(model, data, args)
        args.dry_run = True
        run_dpo.claim(model, data, args)  # a plan writes nothing


@pytest.mark.parametrize(
    "flags",
    [
        "--optim galore_adamw", "--optim_args nonsense", "--lr_scheduler_type cosine_with_min_lr",
        '--lr_scheduler_type cosine --lr_scheduler_kwargs {"x":1}',
    ],
)  # fmt: skip
def test_an_optimiser_or_schedule_that_cannot_be_made_is_one_line_before_anything_is_read(flags):
    with pytest.raises(ValueError, match=r"^--optim .*, --lr_scheduler_type .*: ") as caught:
        run_dpo.check_schedule(parsed(*flags.split())[3])
    assert "\n" not in str(caught.value)


def test_layers_that_are_not_there_are_refused_without_counting_to_them():
    with pytest.raises(ValueError, match="has layers 0 to 3"):
        layer_range(4, "0-99999999999")


@pytest.mark.parametrize(("flags", "named"), [({"max_steps": 10**14}, "max_"), ({"num_train_epochs": 1e9}, "num_")])
def test_more_steps_than_can_be_planned_are_refused_without_planning_them(flags, named):
    args = TrainArguments("out", dry_run=True, **flags)
    pair = Pair(SimpleNamespace(images=("a",)), [1] * 4, [1], [[2]], 36)
    with pytest.raises(ValueError, match=rf"^--{named}.* steps; at most 1,000,000 are planned"):
        run_dpo.plan_batches([pair] * 9, LossArguments(), args)
