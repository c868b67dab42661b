"""How a training ends early: Ctrl-C, a full disk, a place that is not its own; one line each, and it goes on after."""

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainerCallback

from tests.test_arguments import parsed
from tests.test_trainer import make_trainer, pairs  # noqa: F401  fixtures
from train.llava_hound_dpo import run_dpo
from train.llava_hound_dpo.checkpoints import COMPLETE, DiskError
from train.llava_hound_dpo.stopping import INTERRUPTED, STOPPED, one_line_errors

ROOT = Path(__file__).resolve().parent.parent
EVERY_STEP = ("--save_steps", "1", "--max_steps", "3")


class AtStep(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def at_step(trainer, step, action):
    trainer.callback_handler.callbacks.insert(0, AtStep(step, action))
    return trainer


def whole(folder):
    return sorted(path.parent.name for path in folder.glob(f"checkpoint-*/{COMPLETE}"))


# ---- Ctrl-C


def test_ctrl_c_ends_the_training_after_its_step_with_a_checkpoint(make_trainer, tmp_path):  # noqa: F811
    trainer = at_step(make_trainer("--max_steps", "3"), 2, lambda: signal.raise_signal(signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    trainer.train()
    assert trainer.stop.exit_code == STOPPED and whole(tmp_path / "out") == ["checkpoint-2"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_at_once_with_one_line(make_trainer, capsys):  # noqa: F811
    trainer = at_step(make_trainer("--max_steps", "3"), 1, lambda: [signal.raise_signal(signal.SIGINT) for _ in "12"])
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as caught, one_line_errors():
            trainer.train()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, before if number == signal.SIGINT else signal.SIG_DFL)
    assert caught.value.code == INTERRUPTED
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "interrupted: the same command goes on from the newest checkpoint"


def script(tmp_path, trainer):
    """A running `run_stoppable` of a Python program; `called` gets the words of scontrol."""
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$@" >>{tmp_path}/called\n')
    (tmp_path / "scontrol").chmod(0o755)
    text = f'source {ROOT}/scripts/stoppable.sh; run_stoppable {sys.executable} -c "$0"'
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "1"}
    job = subprocess.Popen(
        ["bash", "-c", text, f"print('training', flush=True)\n{trainer}"], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert job.stdout.readline() == "training\n"
    return job


def test_ctrl_c_to_the_launch_script_stops_and_queues_nothing(tmp_path):
    """The terminal sends it to the whole group: the trainer must hear of it by its file alone."""
    trainer = """
import os, pathlib, time
file = pathlib.Path(os.environ["STOP_FILE"])
while not file.exists():
    time.sleep(0.01)
file.write_text("stopped early")
"""
    job = script(tmp_path, trainer)
    os.killpg(job.pid, signal.SIGINT)
    error = job.communicate(timeout=20)[1]
    assert job.returncode == STOPPED and error.startswith("stopping after the current step")
    assert "Traceback" not in error
    assert not (tmp_path / "called").exists()


def test_ctrl_c_twice_ends_the_launch_script(tmp_path):
    job = script(tmp_path, "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: exit(130)")
    os.killpg(job.pid, signal.SIGINT)
    assert job.stderr.readline().startswith("stopping after")
    os.killpg(job.pid, signal.SIGINT)
    job.communicate(timeout=20)
    assert job.returncode == 130


# ---- a full disk


@pytest.fixture
def small_files():
    """A function that lets files grow to 50 kB; undone after the test."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("part", ["weights", "optimiser"])
def test_a_checkpoint_that_finds_no_room_leaves_nothing_and_the_run_goes_on_after(
    make_trainer, tmp_path, small_files, monkeypatch, part  # noqa: F811
):  # fmt: skip
    trainer, before = make_trainer(*EVERY_STEP), resource.getrlimit(resource.RLIMIT_FSIZE)
    if part == "weights":
        at_step(trainer, 2, small_files)
    else:
        save = trainer._save_optimizer_and_scheduler
        late = lambda folder: [small_files() if folder.endswith("-2") else None, save(folder)]  # noqa: E731
        monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", late)
    with pytest.raises(DiskError, match=r"checkpoint-2 could not be written \(.*make room, and the same command"):
        trainer.train()
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-1"]
    make_trainer(*EVERY_STEP).train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))
    assert whole(tmp_path / "out") == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_the_trained_weights_without_room_leave_nothing_half_written(make_trainer, tmp_path, small_files):  # noqa: F811
    trainer = make_trainer("--max_steps", "1", "--save_strategy", "no")
    trainer.train()
    small_files()
    with pytest.raises(DiskError):
        run_dpo.save(trainer, {})
    assert not list((tmp_path / "out").glob("*.safetensors")) and not (tmp_path / "out" / COMPLETE).exists()


@pytest.mark.parametrize("error", [DiskError("out could not be written"), OSError(errno.ENOSPC, "No space left")])
def test_a_full_disk_is_one_line(error, capsys):
    with pytest.raises(SystemExit) as caught, one_line_errors():
        raise error
    assert caught.value.code == 1 and capsys.readouterr().err == f"\nerror: {error}\n"


def test_other_errors_of_the_system_keep_their_traceback():
    with pytest.raises(ConnectionResetError), one_line_errors():
        raise ConnectionResetError


# ---- where it must not write


@pytest.fixture
def folders(tmp_path):
    for name in ("model", "other", "own", "images", "adapter"):
        (tmp_path / name).mkdir()
    for name in ("model/config.json", "other/adapter_config.json", "own/config.json", "own/run.json", "train.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    return tmp_path


def claim(folder, output, *words):
    names = {"model_name_or_path": "model", "image_folder": "images", "data_path": "train.json", "adapter": "adapter"}
    flags = [str(word) for name, value in names.items() for word in (f"--{name}", folder / value)]
    model, data, _, args = parsed(*flags, "--output_dir", str(folder / output), *words)
    with run_dpo._held:
        run_dpo.claim(model, data, args)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("model", "would write over --model_name_or_path"),
        ("link", "would write over --model_name_or_path"),
        ("images/../model/tuned", "would write over --model_name_or_path"),
        ("adapter", "would write over --adapter"),
        ("images", "would write over --image_folder"),
        ("train.json", "would write over --data_path"),
        ("other", "holds another model (adapter_config.json)"),
        ("own/run.json", "cannot be written: "),
        ("own/run.json/below", "cannot be written: "),
        ("x" * 300, "cannot be written: "),
        ("../../../../../../../../../proc/nowhere", "cannot be written: "),
    ],
)
@pytest.mark.parametrize("words", [(), ("--dry_run",)])
def test_an_output_over_an_input_or_nowhere_is_one_line(folders, output, reason, words):
    if "proc" in output and words:
        return  # only an attempt shows it to root
    with pytest.raises(ValueError, match=r"^--output_dir ") as caught:
        claim(folders, output, *words)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("output", ["new/deep", "own", "images/below", "."])
def test_other_places_are_taken(folders, output):
    claim(folders, output)
