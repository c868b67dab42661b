"""A folder, or a file with what lies beside it, that one run owns: whose it is, who writes it, and its log.

A run that is killed at any moment finds its own work again; another run is refused, and so is a second process at once.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llava.messages import one_line
from llava.strict_json import loads

PATIENCE_S = 5  # the children of a killed run may hold its lock for a moment
SHOWN = 4  # differences that a message lists
ANOTHER_FOLDER = "choose another --output, or remove it"


def as_json(content: Any) -> Any:
    """What is read back after it was written as JSON: tuples are lists, paths are strings."""
    return json.loads(json.dumps(content, default=str))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises ValueError naming the file if it holds anything else."""
    try:
        found = loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: broken JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds {type(found).__name__} where a JSON object is due")
    return found


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """A phrase for every entry that is not the same: "beta 0.1 there, 0.2 here"; of a group, for each of its own."""
    there, here, found = as_json(there), as_json(here), []
    for name in sorted({**here, **there}, key=lambda name: not (name in there and name in here)):  # what both say first
        before, now = there.get(name), here.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            found += differences(before, now)
        elif before != now:
            found.append(f"{name} {_short(before)} there, {_short(now)} here")
    return found


def refuse_another(what: Path | str, there: Mapping[str, Any], here: Mapping[str, Any], cure: str) -> None:
    """Raises ValueError, saying what differs, if `what` was made by a run of another identity than `here`."""
    found = differences(there, here)
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ValueError(f"{what} is of another run ({'; '.join(found[:SHOWN])}{more}): {cure}")


def finished_run(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The run.json of this same run, if it has ended in a folder. Raises ValueError if another one has."""
    if not (folder / "run.json").is_file():
        return None
    run = read_object(folder / "run.json")
    refuse_another(f"the finished run in {folder}", run.get("identity") or {}, identity, ANOTHER_FOLDER)
    return run


@contextmanager
def only_writer(place: Path) -> Iterator[int | None]:
    """Hold the lock `place`.lock. Raises ValueError if another process has it; and it goes with the process.

    Gives its descriptor: a child that inherits it holds the lock too, if this process is killed. Where the file system
    has no locks, it is for the user to start one run only.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place.with_name(place.name + ".lock"), timeout=PATIENCE_S)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"{place}: another process is writing there; wait for it, or choose another place") from error
    except NotImplementedError:
        pass
    try:
        yield lock._context.lock_file_fd
    finally:
        lock.release()


class Log:
    """JSON lines that survive a kill: what was appended is on disk, and a line that a kill tore counts as not written.

    One process appends to a file; any may read it meanwhile.
    """

    def __init__(self, path: Path, is_synced: bool = True):
        self.path, self._is_synced, self._is_open = path, is_synced, False

    def append(self, records: Sequence[Any]) -> None:
        """Put the records on disk before anything else happens. Raises OSError; what was there before stays.

        Not synced, they survive a kill as well, but not the machine's: for records that cost less than a disk's turn.
        """
        if not self._is_open:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._cut_torn_line()
            self._is_open = True
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))
            file.flush()
            if self._is_synced:
                os.fsync(file.fileno())

    def __iter__(self) -> Iterator[Any]:
        """The whole lines, in order. Raises ValueError naming a line that is no JSON."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):  # torn
                    return
                try:
                    yield loads(line.decode())
                except ValueError as error:
                    raise ValueError(f"{self.path} line {number}: a damaged line ({error}); remove it") from error

    def _cut_torn_line(self) -> None:
        if self.path.is_file():
            with self.path.open("rb") as file:
                end = sum(len(line) for line in file if line.endswith(b"\n"))
            os.truncate(self.path, end)


def _short(value: Any) -> str:
    return one_line(json.dumps(value) if isinstance(value, dict | list) else str(value), 60)
