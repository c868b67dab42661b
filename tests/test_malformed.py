"""Malformed JSON files of every kind, at every command that reads them: one line that names the file, exit code 2."""

import contextlib
import io
import os
import shutil

import pyarrow.parquet
import pytest

from tests import malformed
from tests.conftest import picture

NESTED = 200_000
BROKEN = {
    "empty": b"",
    "blank": b" \n\t",
    "null": b"null",
    "list": b"[]",
    "text": b'"text"',
    "number": b"17",
    "true": b"true",
    "cut": b'{"a": [1, 2',
    "nested lists": b"[" * NESTED + b"]" * NESTED,
    "nested objects": b'{"a":' * NESTED + b"1" + b"}" * NESTED,
    "name twice": b'{"a": 1, "a": 2}',
    "half a character": b'{"a": "\\ud800"}',
    "endless number": b'{"a": ' + b"9" * 5000 + b"}",
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "latin-1": '{"ä": 1}'.encode("latin-1"),
    "web page": b"<!doctype html><title>404</title>",
    "pickle": b"\x80\x04\x95\x00\x00\x00",
    "other object": b'{"a": 1}',
}
LEFT_OUT = {
    ("zero.json", "train"): {"other object", "half a character"},  # an object without anything known in it: defaults
    ("train.json", "doctor"): BROKEN.keys() - {"list", "cut", "nested lists"},  # which takes a second
}
# file, command, further flags
FILES = [
    ("hf/config.json", "answer", ()),
    ("hf/config.json", "train", ()),
    ("hf/processor_config.json", "answer", ()),
    ("hf/tokenizer.json", "answer", ()),
    ("hf/tokenizer_config.json", "answer", ()),
    ("adapter/adapter_config.json", "answer", ("--model_name_or_path", "@adapter")),
    ("orig/config.json", "answer", ("--model_name_or_path", "@orig")),
    ("orig/model.safetensors.index.json", "answer", ("--model_name_or_path", "@orig")),
    ("clip/config.json", "answer", ("--model_name_or_path", "@orig", "--image_tower", "@clip")),
    ("clip/preprocessor_config.json", "answer", ("--model_name_or_path", "@orig", "--image_tower", "@clip")),
    ("heads.json", "answer", ("--attention_heads", "@heads.json")),
    ("adaptviz.json", "steer", ("--config", "@adaptviz.json")),
    ("zero.json", "train", ("--deepspeed", "@zero.json")),
    ("train.json", "train", ()),
    ("train.json", "mix", ()),
    ("train.json", "doctor", ()),
    ("test.json", "answer", ()),
    ("test.json", "tune", ()),
    ("test.json", "evaluate", ()),
    ("instructions.jsonl", "pairs", ()),
    ("source.json", "generate", ()),
    ("answers.jsonl", "evaluate", ()),
    ("answers.jsonl", "measure", ()),
    ("study.json", "study", ()),
    ("trained/complete.json", "train", ()),
    ("trained/checkpoint-3/complete.json", "train", ()),
    ("out/answers.jsonl.parts/run.json", "answer", ()),
    ("out/made/run.json", "generate", ()),
    ("out/made/unfinished/identity.json", "generate", ()),
    ("out/pairs/run.json", "pairs", ()),
    ("out/set/run.json", "mix", ()),
]
CASES = [(file, command, more, kind) for file, command, more in FILES for kind in BROKEN
         if kind not in LEFT_OUT.get((file, command), ())]  # fmt: skip


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return malformed.build(tmp_path_factory.mktemp("healthy"))


@pytest.fixture
def world(healthy, tmp_path):
    shutil.copytree(healthy.folder, tmp_path / "world")
    return malformed.World(tmp_path / "world")


@pytest.mark.parametrize(("file", "command", "more", "kind"), CASES)
def test_broken_json(world, file, command, more, kind):
    (world / file).parent.mkdir(parents=True, exist_ok=True)
    (world / file).write_bytes(BROKEN[kind])
    line = world.refused(command, r"", *more)
    assert file.split("/")[0] in line


INPUTS = [entry for entry in FILES if not entry[0].startswith(("trained", "out/", "hf/tok", "clip/prep"))]


@pytest.mark.parametrize("kind", ["folder", "device", "missing"])
@pytest.mark.parametrize(("file", "command", "more"), INPUTS)
def test_no_file_at_all(world, file, command, more, kind):
    (world / file).unlink()
    if kind == "folder":
        (world / file).mkdir()
    elif kind == "device":
        (world / file).symlink_to(os.devnull)
    assert file.split("/")[0] in world.refused(command, r"", *more)


def test_a_byte_order_mark_is_no_mistake(world):
    for name in ("train.json", "test.json", "answers.jsonl", "adaptviz.json"):
        (world / name).write_bytes(b"\xef\xbb\xbf" + (world / name).read_bytes())
    for command, more in (("train", ()), ("evaluate", ()), ("steer", ("--config", "@adaptviz.json"))):
        assert world.run(command, *more)[0] == 0


@pytest.mark.parametrize("path", ["../secret.png", "{}/secret.png"])
def test_a_table_does_not_bring_pictures_from_elsewhere(world, path):
    picture("red").save(world / "secret.png")
    (world / "set").mkdir()
    row = {"images": [{"bytes": None, "path": path.format(world.folder)}],
           **{"prompt": "What?", "chosen": "red", "rejected": "blue"}}  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), world / "set/x.parquet")
    flags = ["import", "--path", str(world / "set/x.parquet"), "--output", str(world / "out")]
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as err:
        malformed.MAINS["mix"](flags)
    assert "secret.png" in err.getvalue() and not list((world / "out").rglob("*.png"))
