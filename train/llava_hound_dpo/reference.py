"""Reference log-probs on disk, for runs that do not compute them with every step.

With LoRA the reference is the policy without its adapter, computed on the same packed row at every step; from a cache
it costs a forward pass per pair once, which pays from the second epoch on or when several runs share the cache. Full
fine-tuning changes the only copy of the weights, so there the cache is needed, and filled before the first step.
"""

import hashlib
import itertools
import json
import logging
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object

from llava.checkpoints import Checkpoint
from llava.image import ImageStore
from llava.records import DataError
from llava.run_folder import Log, as_json, differences, read_object
from llava.runtime import write_text
from train.llava_hound_dpo.data import Pair
from train.llava_hound_dpo.scoring import Scores

logger = logging.getLogger(__name__)

LAYOUT_VERSION = 4  # raise it when `packing.pack`, the template or an entry changes what a pair's log-probs are
HEADER = "reference.json"  # what the log-probs beside it were made from
PARTS = "part-*.jsonl"
CHOSEN, REJECTED = ("chosen", "chosen_end"), ("rejected", "rejected_end")  # of `Scores`: a number, a list of them


class ReferenceCache:
    """Log-probs of pairs' answers, and of their end tokens alone, in a folder, keyed by the pair's tokens and pictures.

    So runs that leave the end out of DPO and runs that keep it read the same folder.
    `made_from` says what decides the log-probs apart from the pair (`describe_reference`); a folder made from anything
    else is refused. Every process that fills the cache writes a file of its own, so that processes of one run or of
    several runs may do so at once. Safe to kill: a half-written last line is computed again.
    """

    def __init__(self, folder: Path, made_from: Mapping[str, Any], store: ImageStore):
        self.folder, self.made_from, self.store = folder, as_json(made_from), store
        self._known: dict[str, dict] = {}  # entries by key
        self._by_id: dict[str, dict] = {}  # the latest entry by the record's id, to say what has changed
        self._own: list[dict] = []  # written by this process in this run
        self._keys: dict[Pair, dict] = {}
        own_part = PARTS.replace("*", f"{os.environ.get('RANK', '0')}-{uuid.uuid4().hex[:12]}")
        self._log = Log(folder / own_part)

    def load(self) -> None:
        """Read what is on disk. Raises ValueError if it was made from something else, or is damaged."""
        parts, header = sorted(self.folder.glob(PARTS)), self.folder / HEADER
        if parts and not header.is_file():
            raise ValueError(
                f"{self.folder}: reference log-probs without a {HEADER} that says what they were made from; "
                "delete the folder"
            )
        if header.is_file() and (differing := differences(read_object(header), self.made_from)):
            raise ValueError(
                f"{self.folder}: the reference log-probs there were made from something else: {'; '.join(differing)}; "
                "delete the folder or choose another --reference_cache"
            )
        for path in parts:
            self._remember(_read_part(path))

    def missing(self, pairs: Sequence[Pair]) -> list[int]:
        """Indices of pairs whose log-probs are not known yet."""
        return [index for index, pair in enumerate(pairs) if self._identify(pair)["key"] not in self._known]

    def require(self, pairs: Sequence[Pair]) -> None:
        """Raises DataError listing the pairs whose log-probs are not known, each with the reason."""
        problems = [
            f"{pair.record.where}: no reference log-probs in {self.folder} ({self._reason(pair)}), and the weights are "
            "no longer the reference's; restore the data, or start again in another --output_dir"
            for pair in (pairs[index] for index in self.missing(pairs))
        ]
        if problems:
            raise DataError(problems)

    def append(self, pairs: Sequence[Pair], scores: Scores) -> None:
        """Add the scores of pairs. Raises FloatingPointError naming a pair whose log-probs are not finite."""
        entries, counts = [], [len(pair.rejected) for pair in pairs]
        chosen = (getattr(scores, name).tolist() for name in CHOSEN)
        rejected = ([own.tolist() for own in getattr(scores, name).cpu().split(counts)] for name in REJECTED)
        for pair, *values in zip(pairs, *chosen, *rejected, strict=True):
            entry = dict(zip((*CHOSEN, *REJECTED), values, strict=True))
            if not _is_finite(entry):
                raise FloatingPointError(f"the reference log-probs of {pair.record.where} are not finite: {entry}")
            entries.append({**self._identify(pair), **entry})
        if not (self.folder / HEADER).is_file():
            write_text(self.folder / HEADER, json.dumps(self.made_from, indent=2) + "\n")
        self._log.append(entries)
        self._remember(entries)
        self._own += entries

    def share(self) -> None:
        """Let all processes know the same: what the first one knows, and what any has written in this run.

        By messages, not by the disk: files of another node may take a while to appear on a network file system.
        """
        (known,) = broadcast_object_list([self._known])
        self._known = {}
        self._remember(known.values())
        self._remember(gather_object(self._own))

    def lookup(self, pairs: Sequence[Pair]) -> Scores:
        """Scores of pairs, on the CPU. Raises DataError like `require`."""
        found = [self._known.get(self._identify(pair)["key"]) for pair in pairs]
        if None in found:
            self.require(pairs)
        chosen = {name: torch.tensor([entry[name] for entry in found]) for name in CHOSEN}
        return Scores(**chosen, **{name: torch.tensor([v for one in found for v in one[name]]) for name in REJECTED})

    def status(self, pairs: Sequence[Pair]) -> str:
        """How many of the pairs are there, and why others are not, in words."""
        missing = self.missing(pairs)
        reasons = [self._reason(pairs[index]) for index in missing]
        counts = ", ".join(f"{reasons.count(reason):,} {reason}" for reason in dict.fromkeys(reasons))
        listed = f", {len(missing):,} to compute ({counts})" if missing else ""
        return f"{len(pairs) - len(missing):,} of {len(pairs):,} pairs in {self.folder}{listed}"

    def _identify(self, pair: Pair) -> dict[str, str]:
        """Key of a pair, and what tells later which part of it has changed."""
        if pair not in self._keys:
            record = pair.record
            text = _digest(pair.prompt, pair.chosen, pair.rejected)
            pictures = _digest(record.images, [self.store.stamp(name) for name in record.images])
            self._keys[pair] = {"key": _digest(text, pictures), "id": record.id, "text": text[:16]}
        return self._keys[pair]

    def _remember(self, entries) -> None:
        for entry in entries:
            self._known[entry["key"]] = self._by_id[entry["id"]] = entry

    def _reason(self, pair: Pair) -> str:
        entry = self._by_id.get(pair.record.id)
        if entry is None:
            return "never computed"
        is_same_text = entry["text"] == self._identify(pair)["text"]
        return "whose pictures have changed since" if is_same_text else "whose prompt or answers have changed since"


def describe_reference(checkpoint: Checkpoint, precision: str) -> dict[str, Any]:
    """What decides reference log-probs apart from the pair: weights, precision, picture settings, layout."""
    family = checkpoint.family
    pictures = {"image_aspect_ratio": "pad" if family.pad else "crop", **family.image_processor.to_dict()}
    return {
        "row layout": LAYOUT_VERSION,
        "weights": checkpoint.digest[:16],
        "vision tower": checkpoint.image_tower,
        "hub commit": getattr(checkpoint.config, "_commit_hash", None),
        "precision": precision,
        **{f"picture settings: {name}": value for name, value in pictures.items()},
    }


def _read_part(path: Path) -> list[dict]:
    """Entries of one process's file; a last line that a kill cut short is left out. Raises ValueError."""
    entries = []
    try:
        for entry in Log(path):
            whole = [isinstance(entry[name], str) for name in ("key", "id", "text")]
            if not all([*whole, _is_finite(entry)]):
                raise ValueError("not whole")
            entries.append(entry)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} line {len(entries) + 1}: a damaged entry; delete the file, and its pairs will be computed again"
        ) from error
    return entries


def _is_finite(entry: Mapping[str, Any]) -> bool:
    lists = (entry[name] for name in REJECTED)
    return all(map(math.isfinite, (*(entry[name] for name in CHOSEN), *itertools.chain.from_iterable(lists))))


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()
