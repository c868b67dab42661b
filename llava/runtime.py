"""What every entry point needs around its work: logging, errors in one line, versions, run.json, devices."""

import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from llava.messages import one_line, printable

PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "datasets", "pillow", "numpy")
OURS = ("__main__", "llava", "train", "inference", "inference_optimization", "data_gen", "scripts")
USER_ERROR = 2  # exit code of bad input, as argparse has it


def setup_logging() -> None:
    """Our INFO lines on the first process, warnings elsewhere and of libraries; Ctrl-C ends in a line."""
    sys.excepthook = _say_interrupted
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, force=True)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Printable())
    # Deprecations inside the pinned libraries are not the user's to act on.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(torch|transformers|peft|accelerate|deepspeed)\."
    )
    transformers_logging.disable_progress_bar()  # one per process and load; our own bars tell more
    if is_main_process():
        for name in OURS:
            logging.getLogger(name).setLevel(logging.INFO)


class _Printable(logging.Formatter):
    """The message in lines of printable characters: nothing that a file holds steers a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def is_main_process() -> bool:
    """Whether this is global rank 0 (also true without a launcher)."""
    return int(os.environ.get("RANK", "0")) == 0


def _say_interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    elif is_main_process():
        print("\ninterrupted: the same command does what is left", file=sys.stderr, flush=True)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn bad input (ValueError) and files that cannot be read or written (OSError) into one line and exit code 2.

    For reading configuration and data only: an error of ours should keep its traceback.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        stop(str(error))


def stop(message: str, from_any_process: bool = False) -> NoReturn:
    """Say what is wrong and end with the exit code of bad input.

    All processes find the same bad input: one of them says it, unless only this one can know.
    """
    if is_main_process() or from_any_process:
        print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
    sys.exit(USER_ERROR)


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a run's result, and Python's."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit() -> str:
    """Commit of this source tree, with `-dirty` if it has changes; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # installed, perhaps below the folder of another project of git's
        return "unknown"
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    try:
        commit, changes = (
            subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + ("-dirty" if changes else "")


def short_commit(commit: str) -> str:
    """The first ten digits of what `git_commit` gave, for people to read; `-dirty` stays."""
    return commit[:10] + ("-dirty" if commit.endswith("-dirty") else "")


def write_run_json(path: Path, **content: Any) -> None:
    """Write `run.json`: what was run (content), with which versions, from which commit."""
    record = {**content, "versions": versions(), "git_commit": git_commit(), "command": sys.argv}
    write_text(path, json.dumps(record, indent=2, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that a kill at any time leaves the old content or the new, never half of it."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:  # a full disk, a folder of that name
        temporary.unlink(missing_ok=True)
        raise


def check_outputs(outputs: Sequence[Path], inputs: Iterable[Path | str | None]) -> None:
    """Raises ValueError, before any work, for a file that cannot be written or that would replace one that is read."""
    read = {Path(path).resolve() for path in inputs if path}
    for path in outputs:
        if path.resolve() in read:
            raise ValueError(f"{path} is read and would be overwritten: choose another place to write to")
        if path.is_dir():
            raise ValueError(f"{path} is a folder, where a file is to be written: choose another place to write to")
        there = next(parent for parent in path.absolute().parents if parent.exists())
        try:
            tempfile.TemporaryFile(dir=there).close()
        except OSError as error:
            raise ValueError(f"{path} cannot be written ({error.strerror} in {there})") from error


def write_records(path: Path, records: Iterable[dict[str, Any]], **options: Any) -> None:
    """Write a JSON array, a record a line, as `records.read_json` reads it; `options` of `json.dumps`."""
    lines = ",\n".join(json.dumps(record, **options) for record in records)
    write_text(path, f"[\n{lines}\n]\n")


class _Lines(io.TextIOBase):
    """Standard error for what redraws a line: every state of it that is written is a line of its own."""

    def write(self, text: str) -> int:
        if state := text.strip():
            sys.stderr.write(state + "\n")
        return len(text)


class Progress(tqdm):
    """A bar; where there is no terminal a line every half minute, since a log file takes no carriage returns."""

    def __init__(self, *args, **options):
        if not sys.stderr.isatty():
            options |= {"file": _Lines(), "delay": 10, "mininterval": 30, "maxinterval": 30, "ncols": 100}
        super().__init__(*args, **options)


def without_compiler() -> None:
    """Let DeepSpeed use plain gloo on a CPU instead of compiling its shared-memory kernel (about 100 s, needs g++)."""
    import deepspeed.ops

    compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
    if not torch.cuda.is_available() and isinstance(compatible, dict):
        compatible["deepspeed_shm_comm"] = False


def leave(code: int = 0) -> None:
    """End a process of a distributed CPU job without running destructors.

    gloo's worker threads may abort a Python that is shutting down, after all files are written: some percent of
    ZeRO-3 runs on a CPU ended with exit code 1 that way.
    """
    if not torch.distributed.is_initialized() or torch.cuda.is_available():
        return
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
