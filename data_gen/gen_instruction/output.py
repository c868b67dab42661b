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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from data_gen.drops import Drop
from llava.run_folder import ANOTHER_FOLDER, Log, as_json, finished_run, only_writer, read_object, refuse_another
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
    """One run's folder, from its first moment to its last; as a context, for this process alone to write.

    Entered, it begins, or goes on after the last whole line of its log: `num_done` prompts are done.
    Raises ValueError if the folder holds another run, or if another process is writing it.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.folder, self.identity = folder, as_json(identity)
        self.unfinished = folder / "unfinished"
        self.scratch = self.unfinished / "scratch"  # for temporary files: a killed run's go with the next start
        self.pictures = PictureFolder(folder / "images", self.unfinished)
        # Not synced: a prompt is made again in less time than a disk needs to promise that it is written.
        self._log, self._drops = (Log(self.unfinished / name, is_synced=False) for name in ("log.jsonl", "drops.jsonl"))
        self._stack = ExitStack()
        self.num_done = 0

    def finished(self) -> dict[str, Any] | None:
        """The counts of this same run if it ended before."""
        run = finished_run(self.folder, self.identity)
        if run is None:
            return None
        shutil.rmtree(self.unfinished, ignore_errors=True)
        return run["counts"]

    def __enter__(self) -> "Output":
        self._stack.enter_context(only_writer(self.unfinished))
        try:
            self._begin()
        except ValueError:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def _begin(self) -> None:
        marker = self.unfinished / "identity.json"
        if marker.is_file():
            refuse_another(f"the unfinished run in {self.folder}", read_object(marker), self.identity, ANOTHER_FOLDER)
        elif leftovers := [name for name in ("instructions.jsonl", "images") if (self.folder / name).exists()]:
            raise ValueError(f"{self.folder} holds {leftovers[0]} of something else: choose another --output")
        else:
            write_text(marker, json.dumps(self.identity, indent=2))
        for part in self.unfinished.glob("*.part"):
            part.unlink(missing_ok=True)
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        self._drops.path.unlink(missing_ok=True)  # the same ones in every start of a run
        self._log.append([])  # cuts off half a line
        self.num_done = sum(1 for _ in self._log)

    def report(self, drop: Drop) -> None:
        """List a record that was dropped before any prompt was made."""
        self._drops.append([drop.as_dict()])

    def append(self, record: dict[str, Any] | None, drops: list[Drop]) -> None:
        """The next prompt, or what became of it."""
        self._log.append([{"record": record, "drops": [drop.as_dict() for drop in drops]}])

    def finish(self, counts: dict[str, Any], **content: Any) -> dict[str, Any]:
        """Turn the log into the final files; `counts`, completed with what was made and dropped."""
        made, dropped, passed = Counter(), Counter(), Counter()
        num_bad = 0
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
        shutil.rmtree(self.unfinished)
        return counts

    def abandon(self) -> None:
        """Leave nothing of a run that could not begin, so that its flags may be mended."""
        if not self.num_done:
            shutil.rmtree(self.unfinished)

    def _lines(self) -> Iterator[dict[str, Any]]:
        yield from ({"record": None, "drops": [drop]} for drop in self._drops)
        yield from self._log
