"""Where the scores go: bad places and full disks are one line, before any work, and nothing is left half-written."""

import errno
import json
import os
from pathlib import Path

import pytest

from inference.llava_hound_dpo import evaluate as command
from llava import run_folder
from llava.attention import layer_range
from llava.runtime import check_outputs, write_text

ANSWER = {"question_id": "q", "text": "red", "answer": "red", "image_type": "sequence", "target": 1, "num_images": 2}


@pytest.fixture
def answers(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ANSWER) + "\n")
    return path


@pytest.fixture
def refused(answers, capsys):
    """Run the command, which ends with exit code 2 and one line: the line."""

    def run(output, given=answers):
        with pytest.raises(SystemExit) as ended:
            command.main(["--answers", str(given), "--output", str(output)])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        return error

    return run


def test_places_that_cannot_be_written(refused, answers, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "evaluate", None)  # nothing is worked at before
    assert f"cannot be written ({os.strerror(errno.ENOTDIR)}" in refused(answers / "below")
    (tmp_path / "taken" / "scores.md").mkdir(parents=True)
    assert "scores.md is a folder" in refused(tmp_path / "taken")

    def denied(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    assert f"cannot be written (Permission denied in {tmp_path})" in refused(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scores_never_replace_what_they_are_made_of(refused, answers, tmp_path):
    (tmp_path / "in").mkdir()
    content = answers.read_text()
    (tmp_path / "in" / "scores.json").write_text(content)
    assert "is read and would be overwritten" in refused(tmp_path / "in", tmp_path / "in" / "scores.json")
    assert (tmp_path / "in" / "scores.json").read_text() == content
    (tmp_path / "link").symlink_to(answers)
    with pytest.raises(ValueError, match="would be overwritten"):
        check_outputs([tmp_path / "link"], [answers])


def content_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_full_disk(refused, tmp_path, monkeypatch, answers):
    def full(path, content):
        with path.open("wb") as file:
            file.write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    command.main(["--answers", str(answers), "--output", str(tmp_path / "out")])
    before = content_of(tmp_path / "out")
    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left on device; make room" in refused(tmp_path / "out")
    monkeypatch.undo()
    assert content_of(tmp_path / "out") == before
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_at_once(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE_S", 0)
    with run_folder.only_writer(tmp_path / "out"):
        assert "another process is writing there" in refused(tmp_path / "out")
    (tmp_path / "out").mkdir()
    with run_folder.only_writer(tmp_path / "out"):
        assert "another process is writing there" in refused(tmp_path / "out")


def test_what_cannot_be_replaced_leaves_nothing_behind(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(OSError):
        write_text(tmp_path / "there", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("spec", ["0-99999999999", "3,7-88888888888888", "99999999999"])
def test_a_range_of_layers_does_not_grow_with_its_numbers(spec):
    with pytest.raises(ValueError, match="the language model has layers 0 to 3"):
        layer_range(4, spec)
