"""Single-image records that multi-image prompts are made of, and the pictures that go with them.

Three forms are read: LLaVA-665k style JSON or JSONL (`id`, `image`, `conversations`), data sets of the `datasets`
library (the same fields, or `question` and `answer`; pictures inside or as paths), and a CSV or TSV file with the
columns `image,question,answer[,id,subset]`.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_gen.drops import Drop, Unusable
from data_gen.pictures import Picture, PictureFiles, decode
from data_gen.tables import Table
from llava.records import IMAGE, check_answer, name_of, texts

BOX = re.compile(r"\[\s*\d+(\.\d+)?(,\s*\d+(\.\d+)?){3}\s*\]")  # a bounding box: four numbers in brackets
NO_SUBSET = "all"
GROUP = (12, 60)  # pictures of a group of companions: nine cells and some to spare, up to what leaves a wide choice
MANY = 40  # groups of a subset, where that leaves them large enough: some of them are 5 % of the prompts


@dataclass(frozen=True, slots=True)
class Source:
    """One single-image record."""

    where: str  # "coco.json record 3 (id 17)", for messages
    id: str
    path: str  # of its picture below the image folder; a made-up name if the table holds the picture itself
    subset: str  # companions come from the same one, if possible from the same group in it
    turns: tuple[tuple[str, str], ...]  # question and answer, without `<image>`
    is_conversation: bool  # later turns may refer to earlier ones; else they are questions of their own

    @property
    def has_box(self) -> bool:
        """Whether a bounding box is asked for or given: its numbers are wrong once the picture is pasted elsewhere."""
        return any(BOX.search(text) for turn in self.turns for text in turn)

    def answer_to(self, question: str) -> str | None:
        """What the record answers to the same question, None if it is not asked there."""
        wanted = question.casefold()
        return next((answer for asked, answer in self.turns if asked.casefold() == wanted), None)


class Sources(Sequence[Source]):
    """All usable records of several tables, in their order, in memory.

    `report` gets a Drop for every record that is not usable. Safe in forked workers; can be pickled.
    Raises FileNotFoundError or ValueError if a file as a whole cannot be read or nothing in it is usable.
    """

    def __init__(self, paths: Iterable[str | Path], image_folder: str | Path | None, report: Callable[[Drop], None]):
        self.tables = [Table(path) for path in paths]
        self.files = PictureFiles(image_folder) if image_folder else None
        if outside := [str(table.path) for table in self.tables if not (table.is_embedded or self.files)]:
            raise ValueError(f"{outside[0]}: its pictures are files of their own; say where with --image_folder")
        self.num_read = 0
        self._records: list[Source] = []
        self._places: list[tuple[int, int]] = []  # table and row
        self._read(report)
        self.subsets = list(dict.fromkeys(source.subset for source in self._records))
        number_of = {subset: number for number, subset in enumerate(self.subsets)}
        self._subset = np.array([number_of[source.subset] for source in self._records], dtype=np.int32)
        self.has_box = np.array([source.has_box for source in self._records])  # each record, bool
        self._picture = np.array([self._path_hash(index) for index in range(len(self))], dtype=np.int64)
        self._groups, self._group = self._in_groups()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Source:
        return self._records[index]

    def in_subset(self, subset: str) -> np.ndarray:
        """Whether each record is of the subset, as an array of bool."""
        return self._subset == (self.subsets.index(subset) if subset in self.subsets else -1)

    def companions(self, index: int) -> Iterator[np.ndarray]:
        """One record for every distinct path of the subset of a record, by groups: first its own, then those after it.

        Prompts that keep to their groups share no picture with those of other groups: any share of them can be held
        out. Groups depend on the paths only, so that several runs on the same sources have the same ones.
        """
        groups, own = self._groups[self._subset[index]], self._group[index]
        return (groups[number % len(groups)] for number in range(own, own + len(groups)))

    def alike(self, index: int, question: str) -> Iterator[np.ndarray]:
        """Records of the subset of a record that ask a question too, in any turn, by groups in the same order."""
        keys, records = self._questions
        key = self._question_key(index, question)
        found = records[np.searchsorted(keys, key) : np.searchsorted(keys, key, side="right")]
        found = np.roll(found, -np.searchsorted(self._group[found], self._group[index]))
        ends = np.flatnonzero(np.diff(self._group[found], append=-1)) + 1
        return (found[start:end] for start, end in pairwise((0, *ends)))

    @cached_property
    def _questions(self) -> tuple[np.ndarray, np.ndarray]:
        """The key of every question, sorted, and the record that asks it, by group: 12 bytes a question."""
        counts = [len(source.turns) for source in self]
        asked = (self._question_key(n, question) for n, source in enumerate(self) for question, _ in source.turns)
        keys = np.fromiter(asked, dtype=np.int64, count=sum(counts))
        records = np.repeat(np.arange(len(self), dtype=np.int32), counts)
        order = np.lexsort((self._group[records], keys))
        return keys[order], records[order]

    def _question_key(self, index: int, question: str) -> int:
        return _digest(f"{self._subset[index]} {question.casefold()}")

    def same_path(self, index: int, other: int) -> bool:
        """Whether two records are about the same file."""
        return self._picture[index] == self._picture[other]

    def picture(self, index: int, source: Source) -> Picture:
        """The picture of a record. Raises Unusable if it is missing, damaged or too large."""
        number, row = self._places[index]
        table = self.tables[number]
        if not table.is_embedded:
            return decode(self.files.read(source.path), source.path)
        data = table.picture(row)
        if data is None:
            raise Unusable("missing picture", f"{table.path} has none in row {row}")
        return decode(data, source.path)

    def is_embedded(self, index: int) -> bool:
        """Whether a record's picture is inside its table, without a file of its own."""
        return self.tables[self._places[index][0]].is_embedded

    def _read(self, report: Callable[[Drop], None]) -> None:
        first_drop = None
        for table_number, table in enumerate(self.tables):
            for row, raw in enumerate(table.rows()):
                self.num_read += 1
                try:
                    self._records.append(parse_source(raw, table.path, row + 1))
                    self._places.append((table_number, row))
                except Unusable as error:
                    where = name_of(table.path, row + 1, raw)
                    drop = Drop(_id(raw, table.path, row + 1), where, error.reason, error.detail, error.is_bad)
                    first_drop = first_drop or drop
                    report(drop)
        if not self._records:
            where = ", ".join(str(table.path) for table in self.tables)
            first = f". The first: {first_drop}" if first_drop else ""
            raise ValueError(f"{where}: none of {self.num_read} source records is usable{first}")

    def _path_hash(self, index: int) -> int:
        """The same for records of one subset about one file."""
        table = self._places[index][0] if self.is_embedded(index) else ""
        return _digest(f"{self._subset[index]} {table} {self._records[index].path}")

    def _in_groups(self) -> tuple[list[list[np.ndarray]], np.ndarray]:
        """Groups of every subset, of records with distinct paths, and the number of each record's group."""
        groups, group = [], np.zeros(len(self), dtype=np.int32)
        for subset in range(len(self.subsets)):
            records = np.flatnonzero(self._subset == subset)
            hashes, first = np.unique(self._picture[records], return_index=True)  # in an order by chance
            size = min(max(len(first) // MANY, GROUP[0]), GROUP[1])
            parts = np.array_split(first, max(len(first) // size, 1))
            ends = np.cumsum([len(part) for part in parts])
            places = np.searchsorted(hashes, self._picture[records])
            group[records] = np.searchsorted(ends, places, side="right")
            groups.append([np.sort(records[part]).astype(np.int32) for part in parts])
        return groups, group


def _digest(text: str) -> int:
    """A number of 64 bits that another text hardly ever has."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)


def source_paths(record: dict[str, Any]) -> list[str]:
    """Paths of the pictures that a multi-image record was made of, in order, where it lists them."""
    sources = record.get("sources")
    return [source["path"] for source in sources or [] if isinstance(source, dict) and "path" in source]


def rng_of(seed: int, id: str) -> np.random.Generator:
    """What is drawn for one record: the same whichever others there are."""
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "little")])


def parse_source(raw: Any, table: Path, number: int) -> Source:
    """The record in the row of that number, from 1, of a table. Raises Unusable saying why it cannot be asked about."""
    if isinstance(raw, ValueError):
        raise Unusable("unreadable record", str(raw))
    if not isinstance(raw, dict):
        raise Unusable("malformed record", f"it must be a JSON object, not {type(raw).__name__}")
    try:
        is_conversation = raw.get("conversations") is not None
        has_no_picture = is_conversation and raw.get("image") is None and raw.get("path") is None
        if has_no_picture and IMAGE not in str(raw["conversations"]):  # part of LLaVA's mixture and no mistake
            raise Unusable("text only", "the record has no picture and asks about none", is_bad=False)
        path = _path(raw)
        turns = _conversation(raw["conversations"]) if is_conversation else _questions(raw)
        subset = raw.get("subset") or (path.split("/", 1)[0] if "/" in path else NO_SUBSET)
        "".join((path, str(subset), str(raw.get("id")), *sum(turns, ()))).encode()  # half a character is no text
    except Unusable:
        raise
    except ValueError as error:
        raise Unusable("malformed record", str(error)) from error
    where = name_of(table, number, raw)
    return Source(where, _id(raw, table, number), path, str(subset), turns, is_conversation)


def _id(raw: Any, table: Path, number: int) -> str:
    has_id = isinstance(raw, dict) and raw.get("id") not in (None, "")
    return str(raw["id"]) if has_id else f"{table.stem}_{number}"


def _path(raw: dict) -> str:
    path = raw.get("image") or raw.get("path") or raw.get("image_url")
    if not isinstance(path, str):
        raise ValueError("`image` must be the path of one picture")
    return below(path)


def below(path: str) -> str:
    """The path of a picture, which must stay in its folder. Raises Unusable, or ValueError for an address."""
    if "://" in path or path.startswith("data:"):
        raise ValueError(f"{path[:80]} is an address, not a file: download the pictures and name the files in `image`")
    pure = PurePosixPath(path.replace("\\", "/"))
    if pure.is_absolute() or ".." in pure.parts or re.match(r"[A-Za-z]:", path):
        raise Unusable("path outside the image folder", f"{path} must lie below it")
    return str(pure)


def _conversation(conversations: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(conversations, list) or not all(isinstance(turn, dict) for turn in conversations):
        raise ValueError("`conversations` must be a list of turns with `from` and `value`")
    roles = [turn.get("from") for turn in conversations]
    if "human" not in roles:
        raise Unusable("no question", "the conversation has no human turn")
    if roles != ["human", "gpt"] * (len(roles) // 2):
        raise ValueError(f"human and gpt must take turns, human first; here: {', '.join(map(str, roles))}")
    values = [turn.get("value") for turn in conversations]
    if not all(isinstance(value, str) for value in values):
        raise ValueError("every turn needs a text in `value`")
    counts = [value.count(IMAGE) for value in values[::2]]
    if sum(counts) != 1:
        raise Unusable("no <image>" if not any(counts) else "several <image>", f"{sum(counts)} {IMAGE} for one picture")
    if not counts[0]:
        raise ValueError(f"{IMAGE} comes after the first question")
    return _checked(zip(values[::2], values[1::2], strict=True))


def _questions(raw: dict) -> tuple[tuple[str, str], ...]:
    found = {}
    for name in ("question", "answer"):
        one_or_many = [raw[name]] if isinstance(raw.get(name), str) else raw.get(name)
        found[name] = texts({name: one_or_many}, name)
        if not found[name]:
            raise ValueError(f"the field `{name}` is missing or empty, and there are no `conversations`")
    if len(found["question"]) != len(found["answer"]):
        raise ValueError(f"{len(found['question'])} questions but {len(found['answer'])} answers")
    return _checked(zip(*found.values(), strict=True))


def _checked(turns: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    found = tuple((without_placeholder(question), check_answer(answer.strip())) for question, answer in turns)
    if not all(question and answer for question, answer in found):
        raise ValueError("a question or an answer is empty")
    return found


def without_placeholder(question: str) -> str:
    """The question without `<image>` and the blanks around it; words on both sides stay apart."""
    return re.sub(rf"\s*{IMAGE}\s*", " ", question).strip()
