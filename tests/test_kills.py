"""Commands killed at any of their dealings with the file system, by three signals: started again, the same bytes.

A command runs in a fork of this process, which has everything imported, and gets the signal just before it opens,
moves or removes a file below its output for the n-th time.
"""

import os
import shutil
import signal
import sys
import traceback

import pytest

from llava import run_folder
from tests import malformed
from tests.test_malformed import healthy, world  # noqa: F401  fixtures

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
WATCHED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "os.listdir")
TRAINING = ("--dry_run", "False", "--num_train_epochs", 2, "--per_device_train_batch_size", 1, "--save_steps", 2,
            "--gradient_accumulation_steps", 1, "--lora_r", 2, "--lora_alpha", 4, "--learning_rate", 1e-3,
            "--model_max_length", 500, "--logging_steps", 1)  # fmt: skip
# further words, where the output is, and the files that must be the same
STAGES = {
    "train": (TRAINING, "trained", ("adapter_model.safetensors", "adapter_config.json", "checkpoint-8/*.safetensors")),
    "answer": (("--batch_size", 1), "out", ("answers.jsonl",)),
    "measure": (("--batch_size", 1), "out", ("measured.jsonl",)),
    "generate": (("--format", "pip"), "out/made", ("instructions.jsonl", "dropped.jsonl", "images/**/*")),
    "pairs": (("--batch_size", 1), "out/pairs", ("pairs.json", "dropped.jsonl", "summary.md", "answers.jsonl")),
    "evaluate": (("--image_folder", "@images"), "out/scores", ("scores.json", "scores.md", "report.html")),
}  # fmt: skip


def killed_at(place, number, signum):
    """From now on send this process the signal at its n-th dealing with files below a place; gives the counter."""
    count = [0]

    def look(event, arguments):
        if event in WATCHED and str(arguments[0]).startswith(str(place)):
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signum)

    sys.addaudithook(look)
    return count


def forked(world, command, number=0, signum=None):  # noqa: F811
    """Run a stage in a fork, perhaps killed; its exit status, as `os.waitpid` has it, and its dealings with files."""
    more, place, _ = STAGES[command]
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        code = 99
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            count = killed_at(world / place, number, signum)
            code, out, err = world.run(command, *more)
            (world / "said").write_text(out + err)
            os.write(writing, str(count[0]).encode())
        except KeyboardInterrupt:
            code = 98
        except BaseException:
            (world / "said").write_text(traceback.format_exc())
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        dealings = int(pipe.read() or 0)
    return os.waitpid(child, 0)[1], dealings


def contents(world, command):  # noqa: F811
    _, place, names = STAGES[command]
    return {path.relative_to(world / place): path.read_bytes()
            for name in names for path in sorted((world / place).glob(name)) if path.is_file()}  # fmt: skip


@pytest.fixture(scope="module")
def whole(healthy, tmp_path_factory):  # noqa: F811
    """By stage, what a run leaves that was not killed, and how often it dealt with files."""
    found = {}

    def run(command, folder):
        if command not in found:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(healthy.folder, folder)  # where all runs of it are: paths are part of what they write
            world = malformed.World(folder)
            status, dealings = forked(world, command)
            assert status == 0, (world / "said").read_text()[-3000:]
            found[command] = contents(world, command), dealings
            assert found[command][0]
        return found[command]

    return run


def check(healthy, whole, folder, command, share, signum):  # noqa: F811
    """Kill a stage at a share of its dealings with files, start it again, and compare."""
    expected, dealings = whole(command, folder)
    shutil.rmtree(folder)
    shutil.copytree(healthy.folder, folder)
    world = malformed.World(folder)  # noqa: F811
    status, _ = forked(world, command, max(1, round(share * dealings)), signum)
    if status == 0:  # asked to stop while it wrote its last files, it may well end as if it had not been asked
        assert (command, signum) in (("train", signal.SIGTERM), ("train", signal.SIGINT)), "it was not killed"
        assert contents(world, command) == expected
    else:
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) in (98, 75), "it failed"
    status, _ = forked(world, command)
    assert status == 0, (world / "said").read_text()[-3000:]
    assert contents(world, command) == expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("killed") / "world"


FAST = [("answer", 0.6, signal.SIGKILL), ("measure", 0.5, signal.SIGKILL), ("generate", 0.5, signal.SIGTERM),
        ("pairs", 0.8, signal.SIGINT), ("evaluate", 0.7, signal.SIGKILL), ("train", 0.5, signal.SIGINT)]  # fmt: skip


@pytest.mark.parametrize(("command", "share", "signum"), FAST)
def test_killed_it_ends_with_the_same_bytes(healthy, whole, folder, command, share, signum):  # noqa: F811
    check(healthy, whole, folder, command, share, signum)


@pytest.mark.slow
@pytest.mark.parametrize("command", STAGES)
@pytest.mark.parametrize("number", range(8))
def test_forty_kills(healthy, whole, folder, command, number):  # noqa: F811
    check(healthy, whole, folder, command, (number + 0.5) / 8, SIGNALS[number % 3])


# ---- two at once

LOCKED = {  # what the other process writes
    "train": "trained/training", "answer": "out/answers.jsonl", "measure": "out/measured.jsonl",
    "steer": "out/steered.jsonl", "tune": "out/tuned/grid.jsonl", "evaluate": "out/scores",
    "generate": "out/made/unfinished", "pairs": "out/pairs/pairs", "mix": "out/set/mix",
    "study": "out/study/study", "export": "out/merged",
}  # fmt: skip


@pytest.mark.parametrize("command", LOCKED)
def test_a_second_one_is_refused_in_a_line(world, monkeypatch, command):  # noqa: F811
    monkeypatch.setattr(run_folder, "PATIENCE_S", 0.05)
    more = ("--dry_run", "False") if command == "train" else ()
    with run_folder.only_writer(world / LOCKED[command]):
        line = world.refused(command, r"another process is writing there", *more)
    assert LOCKED[command].rpartition("/")[0] in line


def test_a_second_judge_is_refused_before_it_asks(world, monkeypatch):  # noqa: F811
    monkeypatch.setattr(run_folder, "PATIENCE_S", 0.05)
    with run_folder.only_writer(world / "out/scores"):
        world.refused("evaluate", "another process", "--judge_url", "http://localhost:9", "--judge_model", "m")
