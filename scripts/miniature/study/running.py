"""Runs units: each once, again where a kill left it, never in a folder of another configuration."""

import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from llava.runtime import git_commit, write_text
from scripts.miniature.study.units import KINDS, Unit

logger = logging.getLogger("scripts.miniature.study")

ROOT = Path(__file__).resolve().parents[3]  # where `python -m` finds the stages
BEGUN, FINISHED, LOG = "unit.json", "finished.json", "log.txt"
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class UnitFailed(Exception):
    """A command of a unit ended with an error; the message says which and where its log is."""


def is_finished(output: Path, name: str) -> bool:
    """Whether the unit's folder has its marker."""
    return (output / name / FINISHED).is_file()


def refuse_others(output: Path, units: Sequence[Unit]) -> None:
    """Raises ValueError where a unit's folder was begun with another configuration."""
    problems = []
    for unit in units:
        marker = output / unit.name / BEGUN
        if marker.is_file():
            theirs = json.loads(marker.read_text(encoding="utf-8"))
            if theirs != json.loads(json.dumps(unit.identity)):
                how = _differing(theirs, unit)
                problems.append(f"{output / unit.name} was made with another configuration ({how})")
    if problems:
        more = f" ({len(problems) - 1} more units differ)" if len(problems) > 1 else ""
        raise ValueError(f"{problems[0]}{more}: choose another --output, or remove the folders that differ")


def _differing(theirs: Mapping[str, Any], unit: Unit) -> str:
    """The first thing in which the identities differ, in words."""
    if theirs["base"] != unit.identity["base"]:
        return "the base's weights differ"
    for old, new in zip(theirs["commands"], unit.identity["commands"], strict=False):
        flags = [(a, b, new[place - 1]) for place, (a, b) in enumerate(zip(old, new, strict=False)) if a != b]
        if flags:
            return "{2}: {0} there, {1} here".format(*flags[0])
        if len(old) != len(new):
            return "other flags"
    return "its inputs differ"


def lock(output: Path) -> IO[str]:
    """A file that, while it is open, keeps a second study out of the folder.

    Children hold it too: one that outlives a kill still counts. Raises ValueError if it is held.
    """
    output.mkdir(parents=True, exist_ok=True)
    file = (output / "lock").open("w", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ValueError(
            f"--output {output}: another study, or a process that a killed one left, is at work there: "
            "wait for it, end it, or choose another folder"
        ) from error
    return file


def estimates(output: Path, units: Sequence[Unit], assumed: Mapping[str, float]) -> dict[str, float]:
    """Seconds of a unit by kind: the mean of the finished ones, where there are none what the config assumes."""
    measured: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for unit in units:
        if is_finished(output, unit.name):
            found = json.loads((output / unit.name / FINISHED).read_text(encoding="utf-8"))
            measured[unit.kind].append(found["seconds"])
    return {kind: sum(own) / len(own) if own else assumed.get(kind, 60.0) for kind, own in measured.items()}


def budget(output: Path, units: Sequence[Unit], assumed: Mapping[str, float]) -> str:
    """One line: units by kind times their time, what of it is done."""
    seconds = estimates(output, units, assumed)
    counts = {kind: sum(unit.kind == kind for unit in units) for kind in KINDS}
    parts = [f"{count} {kind} x {seconds[kind]:.0f} s" for kind, count in counts.items() if count]
    total = sum(seconds[unit.kind] for unit in units)
    left = sum(seconds[unit.kind] for unit in units if not is_finished(output, unit.name))
    done = sum(is_finished(output, unit.name) for unit in units)
    return f"{len(units)} units: {', '.join(parts)} = {clock(total)} on one core; {done} finished, {clock(left)} left"


def clock(seconds: float) -> str:
    """A duration to read."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


@dataclass
class Runner:
    """Runs units below `output`, `jobs` at a time. `everything` are all units of the study, for the time left."""

    output: Path
    jobs: int
    everything: Sequence[Unit]
    assumed: Mapping[str, float]
    lock: IO[str]
    _children: set[subprocess.Popen] = field(default_factory=set)

    def run(self, units: Sequence[Unit]) -> None:
        """Every unit that is not finished, after its inputs. Raises UnitFailed; what was finished stays."""
        waiting = [unit for unit in units if not is_finished(self.output, unit.name)]
        with ThreadPoolExecutor(self.jobs) as pool:
            running: dict[Future, Unit] = {}
            try:
                while waiting or running:
                    ready = [unit for unit in waiting if self._is_ready(unit)][: self.jobs - len(running)]
                    assert ready or running, f"the plan lacks inputs of {waiting[0].name}"
                    waiting = [unit for unit in waiting if unit not in ready]
                    running |= {pool.submit(self._run, unit): unit for unit in ready}
                    for done in wait(running, return_when=FIRST_COMPLETED).done:
                        self._report(running.pop(done), done.result())
            except BaseException:
                for child in list(self._children):
                    child.terminate()
                raise

    def _is_ready(self, unit: Unit) -> bool:
        return all(is_finished(self.output, name) for name in unit.inputs)

    def _run(self, unit: Unit) -> float:
        folder, start = self.output / unit.name, time.monotonic()
        write_text(folder / BEGUN, json.dumps(unit.identity, indent=1))
        for words in unit.words(self.output):
            self._call(words, folder / LOG)
        seconds = round(time.monotonic() - start, 1)
        write_text(folder / FINISHED, json.dumps({"seconds": seconds, "git_commit": git_commit()}))
        for checkpoint in folder.glob("adapter/checkpoint-*"):  # needed to resume only
            shutil.rmtree(checkpoint)
        return seconds

    def _call(self, words: Sequence[str], log: Path) -> None:
        """One command, from the repository, what it prints in the log."""
        environment = {**QUIET, **({} if Path("/dev/nvidia0").exists() else {"DS_ACCELERATOR": "cpu"}), **os.environ}
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ python {' '.join(words)}\n")
            file.flush()
            child = subprocess.Popen(
                [sys.executable, *words], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                pass_fds=[self.lock.fileno()],
            )  # fmt: skip
            self._children.add(child)
            code = child.wait()
            self._children.discard(child)
        if code:
            last = log.read_text(encoding="utf-8", errors="replace").strip().rsplit("\n", 1)[-1].rsplit("\r", 1)[-1]
            raise UnitFailed(
                f"{log.parent}: `python {' '.join(words[:2])}` ended with {code}: {last} (all of it: {log})"
            )

    def _report(self, unit: Unit, seconds: float) -> None:
        mean = estimates(self.output, self.everything, self.assumed)
        open_units = [own for own in self.everything if not is_finished(self.output, own.name)]
        left = sum(mean[own.kind] for own in open_units) / self.jobs
        place = len(self.everything) - len(open_units)
        logger.info("[%d/%d] %s  %s  (%s left)", place, len(self.everything), unit.name, clock(seconds), clock(left))
