"""No command writes over what it reads: refused in a line before any work, and nothing changed."""

import shutil

import pytest

from data_gen.gen_instruction import test_set
from tests.malformed import MAINS
from tests.test_malformed import healthy, world  # noqa: F401  fixtures

CASES = {  # command: the file that is read, put under the name that the command writes; and its flags
    "mix": ("train.json", "own/train.json", ("--pairs", "@own/train.json", "--output", "@own")),
    "pairs": ("instructions.jsonl", "own/answers.jsonl", ("--instructions", "@own/answers.jsonl", "--output", "@own")),
    "generate": ("source.json", "own/instructions.jsonl", ("--source", "@own/instructions.jsonl", "--output", "@own")),
    "test set": ("source.json", "own/pip_test_images.json", ("--source", "@own/pip_test_images.json",
                 "--image_folder", "@images", "--output", "@own")),
    "answer": ("test.json", "own.json", ("--data_path", "@own.json", "--output", "@own.json")),
    "measure": ("answers.jsonl", "own.jsonl", ("--answers", "@own.jsonl", "--output", "@own.jsonl")),
    "steer": ("test.json", "own.json", ("--data_path", "@own.json", "--output", "@own.json")),
    "tune": ("test.json", "own/tuned.json", ("--data_path", "@own/tuned.json", "--output", "@own")),
    "evaluate": ("answers.jsonl", "own/scores.json", ("--answers", "@own/scores.json", "--output", "@own")),
    "heads": ("test.json", "own.json", ("--data_path", "@own.json", "--output", "@own.json")),
    "export": ("hf/config.json", "own/config.json", ("--output", "@own")),
    "train": ("hf/config.json", "own/config.json", ("--output_dir", "@own", "--dry_run", "False")),
    "doctor": ("train.json", "own.json", ("--data_path", "@own.json", "--fix_list", "@own.json")),
}  # fmt: skip


@pytest.mark.parametrize("command", CASES)
def test_what_is_read_is_not_written_over(world, monkeypatch, command):  # noqa: F811
    monkeypatch.setitem(MAINS, "test set", test_set.main)
    source, name, flags = CASES[command]
    (world / name).parent.mkdir(exist_ok=True)
    shutil.copy(world / source, world / name)
    before = (world / name).read_bytes()
    words = world.words(command) if command != "test set" else []
    monkeypatch.setattr(world, "words", lambda _: words)
    code, out, err = world.run(command, *flags)
    assert code == 2 and err.count("\n") == 1 and "own" in err, (out[-500:], err)
    assert (world / name).read_bytes() == before
