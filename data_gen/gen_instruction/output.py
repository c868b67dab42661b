"""The output folder of a run: killed at any moment and started again, it ends with the same bytes.

While a run lasts, `unfinished/` holds its identity and a log with one line per prompt, in order. A picture is in place
before its line is. At the end the log becomes instructions.jsonl and dropped.jsonl, run.json is written, and
`unfinished/` goes.
"""

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_gen.drops import Drop
from llava.runtime import write_run_json, write_text


class PictureFolder:
    """Pictures of the output, written so that a file is whole or not there. Can be pickled."""

    def __init__(self, folder: Path, temporary: Path):
        self.folder, self.temporary = folder, temporary

    def write(self, name: str, data: bytes) -> str:
        """Put a picture's bytes under a name; the name."""
        target = self.folder / name
        # Of this process alone: what a killed run left behind may still be at work for a moment.
        part = self.temporary / f"{os.getpid()}.part"
        part.write_bytes(data)
        try:
            part.replace(target)
        except FileNotFoundError:  # rarer, so cheaper than asking every time
            target.parent.mkdir(parents=True, exist_ok=True)
            part.replace(target)
        return name

    def copy(self, name: str, data: bytes, original: Path | None) -> str:
        """Put a source picture under a name: as a hard link to its file where there can be one, else its bytes."""
        target = self.folder / name
        if target.exists():
            return name
        if original:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(original.resolve(), target)
                return name
            except OSError:  # another file system, one without links, or another process was faster
                pass
        return self.write(name, data)


class Output:
    """One run's folder, from its first moment to its last.

    Raises ValueError if the folder holds another run, or if another process is writing it.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.folder, self.identity = folder, json.loads(json.dumps(identity, default=str))
        self.unfinished = folder / "unfinished"
        self.pictures = PictureFolder(folder / "images", self.unfinished)
        self._log_path, self._drops_path = self.unfinished / "log.jsonl", self.unfinished / "sources.jsonl"
        self._log = self._drops = None
        self.num_done = 0

    def finished(self) -> dict[str, Any] | None:
        """The counts of this same run if it ended before."""
        if not (self.folder / "run.json").is_file():
            return None
        run = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        self._compare(run.get("identity"), "a finished run")
        shutil.rmtree(self.unfinished, ignore_errors=True)
        return run["counts"]

    def start(self) -> None:
        """Begin, or go on after the last whole line of the log: `num_done` prompts are done."""
        marker = self.unfinished / "identity.json"
        if marker.is_file():
            self._compare(json.loads(marker.read_text(encoding="utf-8")), "an unfinished run")
        elif leftovers := [name for name in ("instructions.jsonl", "images") if (self.folder / name).exists()]:
            raise ValueError(f"{self.folder} holds {leftovers[0]} of something else: choose another --output")
        else:
            write_text(marker, json.dumps(self.identity, indent=2))
        self._log = self._log_path.open("a+b")
        self._lock()
        self._cut_off_half_a_line()
        for part in self.unfinished.glob("*.part"):
            part.unlink(missing_ok=True)
        self._drops = self._drops_path.open("w", encoding="utf-8")

    def report(self, drop: Drop) -> None:
        """List a record that was dropped before any prompt was made; the same ones in every start of a run."""
        self._drops.write(json.dumps(drop.as_dict()) + "\n")

    def append(self, record: dict[str, Any] | None, drops: list[Drop]) -> None:
        """The next prompt, or what became of it."""
        line = json.dumps({"record": record, "drops": [drop.as_dict() for drop in drops]})
        self._log.write(line.encode() + b"\n")
        self._log.flush()

    def finish(self, counts: dict[str, Any], **content: Any) -> dict[str, Any]:
        """Turn the log into the final files; `counts`, completed with what was made and dropped."""
        made, dropped, passed = Counter(), Counter(), Counter()
        num_bad = 0
        self._drops.flush()
        records, drops = self.unfinished / "instructions.jsonl", self.unfinished / "dropped.jsonl"
        with records.open("w", encoding="utf-8") as written, drops.open("w", encoding="utf-8") as listed:
            for line in self._lines():
                if record := line["record"]:
                    made[record["image_type"]] += 1
                    made["refusals"] += record.get("is_refusal", False)
                    written.write(json.dumps(record) + "\n")
                for drop in line["drops"]:
                    (passed if "prompt" in drop else dropped)[drop["reason"]] += 1
                    num_bad += drop["is_bad"]
                    listed.write(json.dumps(drop) + "\n")
        counts = {**counts, "made": made, "dropped": dropped, "companions_passed_over": passed, "bad": num_bad}
        records.replace(self.folder / records.name)
        drops.replace(self.folder / drops.name)
        write_run_json(self.folder / "run.json", **content, identity=self.identity, counts=counts)
        self._log.close()
        self._drops.close()
        shutil.rmtree(self.unfinished)
        return counts

    def abandon(self) -> None:
        """Leave nothing of a run that could not begin, so that its flags may be mended."""
        if self._log and not self.num_done:
            self._log.close()
            self._drops.close()
            shutil.rmtree(self.unfinished)

    def _lock(self) -> None:
        try:
            fcntl.lockf(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with this process, not with its children
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(
                f"{self.folder}: another process is writing there; wait, or choose another --output"
            ) from error
        except OSError:  # a file system without locks: then it is for the user to start one run only
            pass

    def _lines(self) -> Iterator[dict[str, Any]]:
        with self._drops_path.open(encoding="utf-8") as file:
            yield from ({"record": None, "drops": [json.loads(line)]} for line in file)
        self._log.seek(0)
        yield from map(json.loads, self._log)

    def _cut_off_half_a_line(self) -> None:
        self._log.seek(0)
        end = 0
        for line in self._log:
            if not line.endswith(b"\n"):
                break
            end += len(line)
            self.num_done += 1
        self._log.truncate(end)

    def _compare(self, found: dict[str, Any] | None, what: str) -> None:
        if found == self.identity:
            return
        differences = [
            f"{name} {before!r} there, {self.identity[group][name]!r} here"
            for group in self.identity
            for name, before in ((found or {}).get(group) or {}).items()
            if before != self.identity[group].get(name)
        ]
        detail = ": " + "; ".join(differences[:3]) if differences else ""
        raise ValueError(f"{self.folder} holds {what} of another kind{detail}. Choose another --output, or remove it")
