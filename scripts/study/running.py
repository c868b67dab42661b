"""Runs units: each once, again where a kill left it, never in a folder of another configuration."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.run_folder import read_object, refuse_another
from llava.runtime import git_commit, write_text
from scripts.study.config import ROOT
from scripts.study.units import Unit

logger = logging.getLogger("scripts.study")

BEGUN, FINISHED, LOG = "unit.json", "finished.json", "log.txt"


class UnitFailed(ValueError):
    """A command of a unit ended with an error; the message says which, where its log is, and how to go on."""


def finished(output: Path, name: str) -> dict[str, Any] | None:
    """`seconds` and `git_commit` of a unit that is done, else None."""
    marker = output / name / FINISHED
    return read_object(marker) if marker.is_file() else None


def refuse_others(output: Path, units: Sequence[Unit]) -> None:
    """Raises ValueError where a unit's folder was begun with another configuration."""
    for unit in units:
        folder = output / unit.name
        if (folder / BEGUN).is_file():
            cure = "choose another --output, or remove this folder and those made from it"
            refuse_another(folder, read_object(folder / BEGUN), unit.identity, cure)


def commits(output: Path, units: Iterable[Unit]) -> list[str]:
    """Of the code that the finished units ran with."""
    return sorted({found["git_commit"] for unit in units if (found := finished(output, unit.name))})


def progress(output: Path, units: Sequence[Unit]) -> str:
    """How far the study is."""
    return f"{sum(bool(finished(output, unit.name)) for unit in units)} of {len(units)} units finished"


@dataclass
class Runner:
    """Runs units below `output`, `jobs` at a time, each command behind the words of `launcher`.

    Children inherit the descriptor `lock`: while one that outlives a kill is at work, the folder counts as taken.
    """

    output: Path
    jobs: int
    launcher: Sequence[str] = ("bash",)
    lock: int | None = None
    _children: set[subprocess.Popen] = field(default_factory=set)

    def run(self, units: Sequence[Unit]) -> None:
        """Every unit that is not finished, after its inputs. Raises UnitFailed; what was finished stays."""
        waiting = [unit for unit in units if not finished(self.output, unit.name)]
        with ThreadPoolExecutor(self.jobs) as pool:
            running: dict[Future, Unit] = {}
            try:
                while waiting or running:
                    made = [unit for unit in waiting if all(finished(self.output, name) for name in unit.inputs)]
                    ready = made[: self.jobs - len(running)]
                    assert ready or running, f"the plan lacks inputs of {waiting[0].name}"
                    waiting = [unit for unit in waiting if unit not in ready]
                    running |= {pool.submit(self._run, unit): unit for unit in ready}
                    for done in wait(running, return_when=FIRST_COMPLETED).done:
                        done.result()
                        logger.info("%s  (%s)", running.pop(done).name, progress(self.output, units))
            except BaseException:
                for child in list(self._children):
                    child.terminate()
                raise

    def _run(self, unit: Unit) -> None:
        folder, start = self.output / unit.name, time.monotonic()
        write_text(folder / BEGUN, json.dumps(unit.identity, indent=1))
        for words in unit.words(self.output):
            self._call(words, folder / LOG)
        found = {"seconds": round(time.monotonic() - start, 1), "git_commit": git_commit()}
        write_text(folder / FINISHED, json.dumps(found))
        for checkpoint in folder.glob("adapter/checkpoint-*"):  # needed to resume only
            shutil.rmtree(checkpoint)

    def _call(self, words: Sequence[str], log: Path) -> None:
        """One command, from the repository, with this Python; what it prints is in the log."""
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        kept = [] if self.lock is None else [self.lock]
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {' '.join(words)}\n")
            file.flush()
            child = subprocess.Popen([*self.launcher, *words], cwd=ROOT, env=environment, stdout=file,
                                     stderr=subprocess.STDOUT, pass_fds=kept)  # fmt: skip
            self._children.add(child)
            code = child.wait()
            self._children.discard(child)
        if code:
            ended = f"{log.parent}: {Path(words[0]).name} ended with {code}: {_complaint(log)} (more: {log})"
            raise UnitFailed(f"{ended}. Start the same command again to go on.")


def _complaint(log: Path) -> str:
    """The last line of a log that says what is wrong, else the last one."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().split("\n")
    return next((line for line in reversed(lines) if line.startswith("error")), lines[-1])
