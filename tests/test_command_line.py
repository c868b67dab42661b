"""Flags from dataclasses: what is unknown, retired, missing or out of range is one line that says what to do."""

import importlib
import math
import re
import sys
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from llava import command_line
from llava.command_line import check_numbers, command, flag, parse

ROOT = Path(__file__).parent.parent


@dataclass(kw_only=True)
class Files:
    """What is read and written."""

    _argument_group_name = "files"

    data_path: Path = flag("pairs")
    output: Path | None = flag("where to write", None, aliases=["-o"])


@dataclass(kw_only=True)
class Numbers:
    """How it is computed."""

    _argument_group_name = "numbers"

    batch_size: int = flag("pairs per batch", 8)
    rates: list[float] = flag("learning rates", [0.1, 0.2])
    resume: bool = flag("go on", False)
    kind: str = flag("which", "a", choices=["a", "b"])

    def __post_init__(self):
        check_numbers(self, batch_size=(1, 64))


def parsed(*words, **names):
    return parse((Files, Numbers), "What it does.", list(words), **names)


def test_values_defaults_and_switches():
    files, numbers = parsed("--data_path", "a.json", "--rates", "1", "2.5", "--resume")
    assert (files.data_path, files.output) == (Path("a.json"), None)
    assert (numbers.batch_size, numbers.rates, numbers.resume) == (8, [1.0, 2.5], True)
    assert parsed("--data-path=a.json", "-o", "b", "--resume", "False")[1].resume is False
    first, second = (parsed("--data_path", "a")[1].rates for _ in range(2))
    assert first == [0.1, 0.2] and first is not second


def test_a_near_name_is_offered():
    with pytest.raises(ValueError, match=r"^unknown flag --batchsize; did you mean --batch_size\?$"):
        parsed("--data_path", "a", "--batchsize", "3")


def test_flags_are_not_abbreviated():
    """A flag that is added later must not change what an old command line means."""
    with pytest.raises(ValueError, match="unknown flag --batch_s"):
        parsed("--data_path", "a", "--batch_s", "3")


def test_a_name_like_no_other_points_to_the_help():
    with pytest.raises(ValueError, match="unknown flag --zzzz; see --help"):
        parsed("--data_path", "a", "--zzzz=1")


COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
COMMANDS["aa-train"] = "train.llava_hound_dpo.run_dpo:main"  # that the launch script starts


def started(name, monkeypatch, capsys, *words):
    """What a console command prints before it ends, and its exit code."""
    module, function = COMMANDS[name].split(":")
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(SystemExit) as ended:
        getattr(importlib.import_module(module), function)()
    printed = capsys.readouterr()
    return ended.value.code, printed.out + printed.err


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_shows_every_flag_once_and_ours_first(name, monkeypatch, capsys):
    shown = []
    plain = command_line.Parser.__init__
    monkeypatch.setattr(command_line.Parser, "__init__",
                        lambda self, groups, **more: shown.extend(groups) or plain(self, groups, **more))  # fmt: skip
    code, printed = started(name, monkeypatch, capsys, "--help")
    printed = printed[printed.index("options:") :]
    places = {}
    for kind in shown:
        own = [f.name for f in fields(kind) if f.init and f.name in kind.__annotations__]
        for field in own + [f.name for f in fields(kind) if f.init and f.name not in own]:
            assert len(found := re.findall(rf"^  (?:-\w \w+, )?--{field}\b", printed, re.M)) == 1, (field, found)
            places[field] = printed.index(f"--{field}")
    assert code == 0 and places
    theirs = printed.find("transformers.TrainingArguments:")
    ours = [place for kind in shown for field, place in places.items() if field in kind.__annotations__]
    assert theirs < 0 or max(ours) < theirs


HINTS = {
    "aa-train": {
        "lora_rank": "lora_r", "attention_lambda": "attention_weight", "lambda": "attention_weight",
        "batch_size": "per_device_train_batch_size", "epochs": "num_train_epochs", "model_path": "model_name_or_path",
        "max_tokens": "model_max_length", "output": "output_dir", "images": "image_folder", "dataset": "data_path",
        "steps": "max_steps", "tau": "attention_threshold", "alpha": "dpo_alpha",
        "grad_accum": "gradient_accumulation_steps", "num_workers": "dataloader_num_workers",
        "layers": "attention_layers", "lr": "learning_rate",
    },
    "aa-answer": {"model_path": "model_name_or_path", "max_tokens": "max_new_tokens", "questions": "data_path",
                  "output_dir": "output", "bs": "batch_size", "torch_dtype": "dtype", "heads": "attention_heads"},
    "aa-steer": {"model": "model_name_or_path", "max_length": "max_new_tokens", "image_dir": "image_folder"},
    "aa-evaluate": {"data_path": "questions", "output_dir": "output", "images": "image_folder"},
    "aa-mix": {"data_path": "pairs", "dataset": "pairs", "out": "output"},
    "aa-generate": {"data_path": "source", "workers": "num_workers", "images": "image_folder"},
    "aa-doctor": {"max_tokens": "model_max_length", "dataset": "data_path", "checkpoint": "model_name_or_path"},
    "aa-export": {"output_dir": "output", "precision": "dtype", "model_path": "model_name_or_path"},
    "aa-study": {"workers": "jobs", "output_dir": "output"},
}  # fmt: skip


@pytest.mark.parametrize(("name", "word", "flag"), [(n, w, f) for n, own in HINTS.items() for w, f in own.items()])
def test_what_a_flag_is_called_elsewhere_leads_to_it(name, word, flag, monkeypatch, capsys):
    code, printed = started(name, monkeypatch, capsys, f"--{word}", "1")
    assert code == 2 and printed.strip().endswith(f"error: unknown flag --{word}; did you mean --{flag}?")


@pytest.mark.parametrize("word", ["--old_flag", "--old-flag", "--old_flag=3"])
def test_a_retired_flag_says_what_to_do_instead(word):
    with pytest.raises(ValueError, match="--old_flag is a flag of earlier scripts that no longer exists: use --kind"):
        parsed(word, retired={"old_flag": "use --kind"})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "--data_path"),
        (["--data_path", "a", "--batch_size", "many"], "batch_size"),
        (["--data_path", "a", "--kind", "c"], "kind.*'c'"),
        (["--data_path", "a", "--batch_size", "0"], r"--batch_size 0: must be at least 1 and at most 64"),
        (["--data_path"], "data_path.*expected one argument"),
        (["--data_path", "a", "left over"], "left over"),
    ],
)
def test_what_is_wrong_is_one_line(words, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        parsed(*words)
    assert "\n" not in str(caught.value)


def test_help_has_groups_descriptions_and_defaults(capsys):
    with pytest.raises(SystemExit) as ended:
        parsed("--help")
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and "What it does." in printed
    assert printed.index("files:") < printed.index("--data_path DATA_PATH", printed.index("files:"))
    assert printed.index("files:") < printed.index("numbers:") and "pairs per batch (default: 8)" in printed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, 65, 10**400, [1, 2, 65], [math.nan]])
@pytest.mark.parametrize("most", [64, None])
def test_numbers_outside_their_limits(value, most):
    numbers = Numbers()
    numbers.batch_size = value
    if most is None and value in (65, 10**400, [1, 2, 65]):
        check_numbers(numbers, batch_size=(0, None))
        return
    with pytest.raises(ValueError, match="--batch_size"):
        check_numbers(numbers, batch_size=(0, most))


def test_no_number_is_no_error():
    numbers = Numbers()
    numbers.batch_size = None
    check_numbers(numbers, batch_size=(0, None))


def test_the_first_word_picks_the_command(capsys):
    assert command(["run", "--x", "1"], ["run", "report"], "Two.") == ("run", ["--x", "1"])
    for words in ([], ["rum"]):
        with pytest.raises(ValueError, match="the first word must be one of run, report"):
            command(words, ["run", "report"], "Two.")
    with pytest.raises(SystemExit):
        command(["--help"], ["run", "report"], "Two.")
    assert "commands: run, report" in capsys.readouterr().out
