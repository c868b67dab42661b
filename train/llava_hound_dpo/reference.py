"""Reference log-probs: from the model with its adapter off, or from a file computed before training.

With LoRA the reference is the policy without its adapter, computed on the same packed row. Full fine-tuning changes
the only copy of the weights, so there the log-probs of all pairs are computed once, before the first step.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llava.checkpoints import weight_digest
from llava.records import DataError
from train.llava_hound_dpo.data import Pair, PairDataset

logger = logging.getLogger(__name__)

LAYOUT_VERSION = 1  # raise it when `layout.pack` or the template changes what a pair's log-probs are


class ReferenceCache:
    """Log-probs (chosen, rejected) of pairs on disk, one JSONL file per process, keyed by content.

    A key is a hash of the pair's tokens and pictures together with the model's fingerprint, so that a file of another
    model, data set or layout is never read as this one's. Safe to kill: a half-written last line is ignored.
    """

    def __init__(self, folder: Path, fingerprint: str):
        self.folder, self.fingerprint = folder, fingerprint
        self._known: dict[str, tuple[float, float]] = {}
        self._keys: dict[int, list[str]] = {}

    def keys(self, dataset: PairDataset) -> list[str]:
        """One key per pair of the data set."""
        if id(dataset) not in self._keys:
            self._keys[id(dataset)] = [self._key(dataset, pair) for pair in dataset.pairs]
        return self._keys[id(dataset)]

    def load(self) -> None:
        """Read what all processes have written so far."""
        for path in sorted(self.folder.glob("reference-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # cut short by a kill; the pair is computed again
                self._known[entry["key"]] = (entry["chosen"], entry["rejected"])

    def missing(self, dataset: PairDataset) -> list[int]:
        """Indices of pairs whose log-probs are not known yet."""
        return [index for index, key in enumerate(self.keys(dataset)) if key not in self._known]

    def append(self, rank: int, keys: Sequence[str], chosen: Tensor, rejected: Tensor) -> None:
        """Add log-probs to this process's file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = zip(keys, chosen.tolist(), rejected.tolist(), strict=True)
        with (self.folder / f"reference-{rank}.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"key": k, "chosen": c, "rejected": r}) + "\n" for k, c, r in rows)

    def lookup(self, dataset: PairDataset, indices: Iterable[int], device) -> tuple[Tensor, Tensor]:
        """(chosen, rejected) log-probs of pairs. Raises DataError naming the first pair that has none."""
        keys = self.keys(dataset)
        try:
            found = [self._known[keys[index]] for index in indices]
        except KeyError as error:
            where = dataset.pairs[keys.index(error.args[0])].record.where
            raise DataError(
                [f"{self.folder}: no reference log-probs of {where}; delete the folder and start again"]
            ) from error
        chosen, rejected = torch.tensor(found, device=device).unbind(dim=-1)
        return chosen, rejected

    def _key(self, dataset: PairDataset, pair: Pair) -> str:
        stamps = [dataset.store.stamp(name) for name in pair.record.images]
        return _digest(self.fingerprint, pair.prompt, pair.chosen, pair.rejected, pair.record.images, stamps)


def fingerprint(model_path: str, commit: str | None, dtype: str, image_processor, pad: bool) -> str:
    """Hash of what decides reference log-probs apart from the pair: weights, precision, picture processing, layout.
    """
    settings = json.dumps(image_processor.to_dict(), sort_keys=True, default=str)
    return _digest(LAYOUT_VERSION, weight_digest(model_path), commit, dtype, settings, pad)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()
