"""The output folder of a run: killed at any moment and started again, it ends with the same bytes.

While a run lasts, `unfinished/` holds its identity and a log with one line per prompt, in order. A picture is in place
before its line is. At the end the log becomes instructions.jsonl and dropped.jsonl, run.json is written, and
`unfinished/` goes.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from data_gen.drops import Drop
from llava.run_folder import ANOTHER_FOLDER, Log, as_json, finished_run, only_writer, read_object, refuse_another
from llava.runtime import write_run_json, write_text


class PictureFolder:
    """Pictures of the output, written so that a file is whole or not there. Can be pickled."""

    def __init__(self, folder: Path, temporary: Path):
        self.folder, self.temporary = folder, temporary

    def write(self, name: str, data: bytes, original: Path | None = None) -> str:
        """Put a picture under a name, if it is not there yet; of an original as a hard link, where there can be one."""
        target = self.folder / name
        if target.exists():  # whole, and of this run
            return name
        target.parent.mkdir(parents=True, exist_ok=True)
        if original:
            with suppress(OSError):  # another file system, one without links, or another process was faster
                os.link(original.resolve(), target)
                return name
        # Of this process alone: what a killed run left behind may still be at work for a moment.
        part = self.temporary / f"{os.getpid()}.part"
        part.write_bytes(data)
        part.replace(target)
        return name


class Output:
    """One run's folder, from its first moment to its last. Raises ValueError if it holds another run."""

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.folder, self.identity = folder, as_json(identity)
        self.unfinished = folder / "unfinished"
        self.pictures = PictureFolder(folder / "images", self.unfinished)
        # Not synced: a prompt is made again in less time than a disk needs to promise that it is written.
        self._log = Log(self.unfinished / "log.jsonl", is_synced=False)
        self._drops: list[Drop] = []  # before any prompt: the same ones in every start of a run
        self.report = self._drops.append
        self.num_done = 0

    def finished(self) -> dict[str, Any] | None:
        """The counts of this same run if it ended before."""
        run = finished_run(self.folder, self.identity)
        if run is None:
            return None
        shutil.rmtree(self.unfinished, ignore_errors=True)
        return run["counts"]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """For this process alone to write. Raises ValueError if another one does, or if it holds another run."""
        with only_writer(self.unfinished):
            if self._marker.is_file():
                there, what = read_object(self._marker), f"the unfinished run in {self.folder}"
                refuse_another(what, there, self.identity, ANOTHER_FOLDER)
            elif leftovers := [name for name in ("instructions.jsonl", "images") if (self.folder / name).exists()]:
                raise ValueError(f"{self.folder} holds {leftovers[0]} of something else: choose another --output")
            yield

    def begin(self) -> None:
        """Begin, or go on after the last whole line of the log: `num_done` prompts are done."""
        write_text(self._marker, json.dumps(self.identity, indent=2))
        for part in self.unfinished.glob("*.part"):
            part.unlink(missing_ok=True)
        self._log.append([])  # cuts off half a line
        self.num_done = sum(1 for _ in self._log)

    @property
    def _marker(self) -> Path:
        return self.unfinished / "identity.json"

    def append(self, record: dict[str, Any] | None, drops: list[Drop]) -> None:
        """The next prompt, or what became of it."""
        self._log.append([{"record": record, "drops": [drop.as_dict() for drop in drops]}])

    def finish(self, counts: dict[str, Any], **content: Any) -> dict[str, Any]:
        """Turn the log into the final files; `counts`, completed with what was made and dropped."""
        made, dropped, passed = Counter(), Counter(), Counter()
        num_bad = 0
        records, drops = self.unfinished / "instructions.jsonl", self.unfinished / "dropped.jsonl"
        with records.open("w", encoding="utf-8") as written, drops.open("w", encoding="utf-8") as listed:
            for line in chain([{"record": None, "drops": [drop.as_dict() for drop in self._drops]}], self._log):
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
        shutil.rmtree(self.unfinished)
        return counts
