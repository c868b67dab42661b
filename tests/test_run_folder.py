"""Whose a folder is, in words; one writer at a time, even after a kill; a log whose last line may be torn."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llava import run_folder
from llava.run_folder import Log, differences, only_writer, read_object, refuse_another

ROOT = Path(__file__).resolve().parent.parent

# ---- identity


def test_what_differs_is_said_in_words():
    there = {"beta": 0.1, "data": {"path": "a.json", "rows": 3}, "gone": 1, "same": (1, 2)}
    here = {"beta": 0.2, "data": {"path": "a.json", "rows": 4}, "new": Path("x"), "same": [1, 2]}
    found = ["beta 0.1 there, 0.2 here", "rows 3 there, 4 here", "new None there, x here", "gone 1 there, None here"]
    assert differences(there, here) == found


def test_the_same_run_is_let_in():
    refuse_another("out", {"seed": 1, "files": ["a"]}, {"files": ("a",), "seed": 1}, "choose another")


def test_another_run_is_refused_in_one_line_that_says_the_cure():
    there, here = ({f"setting{n}": n + shift for n in range(6)} for shift in (0, 1))
    with pytest.raises(
        ValueError, match=r"^out is of another run \(setting0 0 there, 1 here; .*\): choose another$"
    ) as e:
        refuse_another("out", there, here, "choose another")
    assert "setting3" in str(e.value) and "setting4" not in str(e.value) and "and 2 more" in str(e.value)


def test_long_values_are_cut():
    (found,) = differences({"prompt": "x" * 500}, {"prompt": "short"})
    assert len(found) < 100 and "..." in found


@pytest.mark.parametrize(("content", "expected"), [("[1]", "holds list"), ("{", "broken JSON"), ("", "broken JSON")])
def test_a_file_without_an_object_is_named(tmp_path, content, expected):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=rf"run\.json: {expected}"):
        read_object(tmp_path / "run.json")


# ---- the lock

HOLD = """
import sys, time
from pathlib import Path
from llava.run_folder import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of `out`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_in_one_line_and_let_in_after_a_kill(other, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE_S", 0.2)
    with (
        pytest.raises(ValueError, match=r"out: another process is writing there") as refused,
        only_writer(tmp_path / "out"),
    ):
        pass
    assert "\n" not in str(refused.value)
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    with only_writer(tmp_path / "out"):
        pass


def test_the_lock_goes_with_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), only_writer(tmp_path / "new" / "out"):
            raise KeyError


# ---- the log


def test_what_was_appended_is_read_back_in_order(tmp_path):
    log = Log(tmp_path / "new" / "log.jsonl")
    assert list(log) == []
    log.append([{"n": 0}, {"n": 1, "text": "Ü\n"}])
    log.append([[2]])
    assert list(Log(log.path)) == [{"n": 0}, {"n": 1, "text": "Ü\n"}, [2]]


@pytest.mark.parametrize("torn", [b'{"n": 1', b'{"n": 1}', b"\xc3", b""])
def test_a_torn_last_line_counts_as_not_written_and_is_cut_before_the_next(tmp_path, torn):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"n": 0}\n' + torn)
    assert list(Log(path)) == [{"n": 0}]
    Log(path).append([{"n": 2}])
    assert path.read_bytes() == b'{"n": 0}\n{"n": 2}\n'


def test_a_line_torn_before_any_other(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"n"')
    log = Log(tmp_path / "log.jsonl")
    assert list(log) == []
    log.append([1])
    assert list(log) == [1]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"n": 0}\n{"n": \n{"n": 2}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl line 2: a damaged line"):
        list(Log(path))
