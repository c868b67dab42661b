"""Answers on disk: every finished one at once, in parts, and one file in the order of the test set at the end.

A run that is killed at any moment goes on where it was, without losing or repeating an answer.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava.run_folder import Log, as_json, read_object, refuse_another
from llava.runtime import is_main_process, write_run_json, write_text

logger = logging.getLogger(__name__)


class AnswerStore:
    """The answers file `output`, and the folder of parts beside it while it is not finished.

    `identity` is what decides the answers. Raises ValueError if `output` or its parts are of another identity.
    """

    def __init__(self, output: Path, identity: dict[str, Any]):
        self.output, self.identity = output, as_json(identity)
        self.parts = output.with_name(output.name + ".parts")
        self.run_json = output.with_suffix(".run.json")
        self.marker = self.parts / "run.json"
        self._logs: dict[int, Log] = {}
        if self.marker.is_file():
            self._refuse_another(self.marker, self.parts)
        elif output.exists():
            self._refuse_another(self.run_json, output)

    @property
    def is_finished(self) -> bool:
        """Whether the answers file is there and nothing is left to merge."""
        return self.output.is_file() and not self.marker.exists()

    def begin(self) -> set[int]:
        """Numbers of the questions answered before; the folder of parts exists afterwards."""
        self.parts.mkdir(parents=True, exist_ok=True)
        if is_main_process() and not self.marker.is_file():
            write_text(self.marker, json.dumps(self.identity, indent=2))
        done = {line["number"] for line in self._lines()}
        if done:
            logger.info("%d answers found in %s: continuing", len(done), self.parts)
        return done

    def append(self, part: int, records: Sequence[dict[str, Any]]) -> None:
        """Put answers, each with the `number` of its question, on disk before anything else happens. Raises OSError."""
        log = self._logs.setdefault(part, Log(self.parts / f"{part}.jsonl"))
        log.append(records)

    def finish(self, ids: Sequence[str]) -> dict[str, int]:
        """Write the answers file and its run.json, then remove the parts; how many `answers` there are, how many were
        `cut_off`, and how many are `too_long` for what the model was made for. Raises RuntimeError if one is missing.
        """
        lines = {line.pop("number"): line for line in self._lines()}
        missing = [id for number, id in enumerate(ids) if number not in lines]
        if missing:
            raise RuntimeError(
                f"{len(missing)} questions have no answer, {missing[0]} first: start the same command again"
            )
        counts = {
            "answers": len(ids),
            "cut_off": sum(line.get("is_complete") is False for line in lines.values()),
            "too_long": sum(line.get("is_too_long") is True for line in lines.values()),
        }
        write_text(self.output, "".join(json.dumps(lines[number]) + "\n" for number in range(len(ids))))
        write_run_json(self.run_json, **self.identity, counts=counts)
        for path in sorted(self.parts.iterdir(), key=lambda path: path == self.marker):  # the marker goes last
            path.unlink()
        self.parts.rmdir()
        return counts

    def _lines(self) -> Iterator[dict[str, Any]]:
        for path in sorted(self.parts.glob("*.jsonl")):
            yield from Log(path)

    def _refuse_another(self, record: Path, what: Path) -> None:
        if not record.is_file():
            raise ValueError(f"{what} is there, but no {record.name}: choose another --output, or remove it")
        there = {name: value for name, value in read_object(record).items() if name in self.identity}
        refuse_another(what, there, self.identity, "remove it or choose another --output")
