"""Who may train in a folder: one at a time, and nobody in one that is finished."""

import json
from types import SimpleNamespace

import pytest

from llava.attention import layer_range
from llava.run_folder import only_writer
from tests.conftest import preference
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


def test_what_is_left_out_or_dropped_is_part_of_the_run_and_listed(checkpoint, data, tmp_path):
    records = [preference(number, 2) for number in range(5)]
    del records[1]["chosen"]
    path, bad = data(records), tmp_path / "bad.json"
    bad.write_text(json.dumps(["pair_3"]))
    flags = f"--model_name_or_path {checkpoint} --data_path {path} --image_folder {data.images} --bad_records drop"

    def read(more):
        settings = run_dpo.parse(f"{flags} --output_dir {tmp_path / 'out'} --use_cpu True {more}".split())
        inputs = run_dpo.read_inputs(*settings)
        return settings, inputs, run_dpo.describe_run(*settings, inputs)

    settings, inputs, identity = read(f"--leave_out {bad}")
    run_dpo.record_run(*settings, inputs)
    counts = json.loads((tmp_path / "out/run.json").read_text())["counts"]
    assert counts["train"]["pairs"] == 3 and counts["leave_out"] == ["pair_3"]
    (line,) = counts["dropped"]
    assert "record 2 (id pair_1): the field `chosen` is missing" in line
    mark_complete(tmp_path / "out", identity)
    assert is_finished(tmp_path / "out", read(f"--leave_out {bad}")[2])
    with pytest.raises(ValueError, match=r"leave_out 1 named \(\w+\) there, 0 named \(\w+\) here"):
        is_finished(tmp_path / "out", read("")[2])
