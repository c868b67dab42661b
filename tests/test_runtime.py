"""What every entry point needs around its work: the commit of the code, whole files, errors in one line."""

import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llava import runtime

DIRTY = "-dirty"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one commit, which `llava/runtime.py` takes for its own; returns its folder."""
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "llava/runtime.py"))
    (tmp_path / "code.py").write_text("1")
    identity = ["-c", "user.name=x", "-c", "user.email=x"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    return tmp_path


def test_a_changed_file_makes_the_commit_dirty(checkout):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True).stdout.strip()
    (checkout / "new.txt").write_text("not tracked: no change of the code")
    assert runtime.git_commit() == head
    (checkout / "code.py").write_text("2")
    assert runtime.git_commit() == head + DIRTY
    assert runtime.short_commit(head + DIRTY) == head[:10] + DIRTY and runtime.short_commit(head) == head[:10]


def test_outside_a_checkout_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "llava/runtime.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert runtime.git_commit() == "unknown" == runtime.short_commit("unknown")


def test_an_installed_package_does_not_take_the_commit_of_the_project_around_it(checkout, monkeypatch):
    monkeypatch.setattr(runtime, "__file__", str(checkout / "env/site-packages/llava/runtime.py"))
    (checkout / "env/site-packages/llava").mkdir(parents=True)
    assert runtime.git_commit() == "unknown"


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "folder/scores.json"
    runtime.write_text(path, "old")

    def half(self, content):
        with self.open("wb") as file:
            file.write(content[:1])
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="No space"):
            runtime.write_text(path, "new")
    assert path.read_text() == "old"
    runtime.write_text(path, "new")
    assert path.read_text() == "new"


BAD_INPUT = [ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError]


@pytest.mark.parametrize("error", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(capsys, error):
    with pytest.raises(SystemExit) as ended, runtime.user_errors():
        raise error("train.json: wrong")
    assert ended.value.code == 2 and capsys.readouterr().err == "error: train.json: wrong\n"


def test_an_error_of_ours_keeps_its_traceback():
    with pytest.raises(KeyError), runtime.user_errors():
        raise KeyError("a bug")


def test_only_the_first_process_says_what_all_of_them_find(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        runtime.stop("found by all")
    with pytest.raises(SystemExit):
        runtime.stop("found here", from_any_process=True)
    assert capsys.readouterr().err == "error: found here\n"


HOSTILE = "a\x1b[2J\r\x00\u202e\u2028b"


def test_what_a_file_holds_steers_no_terminal(capsys):
    """Neither in a line of the log, whose own new lines stay, nor in the line of an error."""
    runtime.setup_logging()
    logging.getLogger("llava").info("one %s\ntwo", HOSTILE)
    with pytest.raises(SystemExit), runtime.user_errors():
        raise ValueError(f"{HOSTILE}\n{'x' * 10**6}\nfix it")
    out, err = capsys.readouterr()
    assert out == "one a\\x1b[2J\\r\\x00\\u202e\\u2028b\ntwo\n"
    assert err[:-1].isprintable() and len(err) < 500
    assert err.startswith("error: a\\x1b[2J") and err.endswith("fix it\n")


def test_an_interrupt_ends_in_a_line():
    code = "import os; from llava.runtime import setup_logging; setup_logging(); os.kill(os.getpid(), 2)"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT
    assert done.stderr.strip().splitlines() == ["interrupted: the same command does what is left"]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_bar_is_lines_where_there_is_no_terminal(monkeypatch, capsys, is_terminal):
    """Of a log file: no carriage return, a line at the end of what takes long, nothing of what does not."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    assert list(runtime.Progress(range(3), desc="short")) == [0, 1, 2]
    with runtime.Progress(total=3, desc="long") as bar:
        bar.start_t -= 60
        bar.last_print_t -= 60
        bar.update(3)
    err = capsys.readouterr().err
    if is_terminal:
        assert "\r" in err and "short" in err
    else:
        assert "\r" not in err and "short" not in err
        assert [line.split(":")[0] for line in err.splitlines()] and set(err.split(":")[0].split()) == {"long"}
