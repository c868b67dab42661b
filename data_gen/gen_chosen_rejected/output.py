"""Pairs and what was dropped on disk, and how many of each: pairs.json, dropped.jsonl, summary.md, run.json."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_gen.correctness import is_right
from data_gen.gen_chosen_rejected.rules import Candidate, Rules, compares, judge, num_pictures, unfit
from llava import markdown
from llava.asked import target_fields
from llava.records import Question, messages
from llava.runtime import write_records, write_text

KEPT = "kept"


@dataclass
class Selection:
    """Pairs, the lines of dropped.jsonl, and how often which verdict was given by format and number of pictures."""

    pairs: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    verdicts: Counter = field(default_factory=Counter)  # of (format, pictures, KEPT or reason)

    def keep(self, candidate: Candidate) -> None:
        """Make a pair of the true answer and this one."""
        self.pairs.append(pair(candidate))
        self.verdicts[candidate.question.image_type, num_pictures(candidate.question), KEPT] += 1

    def drop(self, question: Question, reason: str, numbers: dict[str, Any], text: str | None = None) -> None:
        """List and count what no pair is made of."""
        said = {} if text is None else {"answer": question.answer, "text": text}
        kind = {"image_type": question.image_type, "num_images": num_pictures(question)}
        self.dropped.append({"id": question.id, "reason": reason, **numbers, **kind, **said})
        self.verdicts[*kind.values(), reason] += 1

    def counts(self) -> dict[str, Any]:
        """For run.json."""
        by_format: dict[str, dict[str, int]] = {}
        for (image_type, number, verdict), count in sorted(self.verdicts.items()):
            by_format.setdefault(f"{image_type} {number}", {})[verdict] = count
        dropped = Counter(line["reason"] for line in self.dropped)
        total = len(self.pairs) + len(self.dropped)
        counts = {"candidates": total, KEPT: len(self.pairs), "dropped": dict(sorted(dropped.items()))}
        return counts | {"by_format": by_format, "true_of_another": self._shares()}

    def _shares(self) -> dict[str, dict[str, int]]:
        """Kept answers by format that are true of another image, of those where that is known."""
        told = [pair for pair in self.pairs if "true_of_another" in pair]
        found = Counter((pair["image_type"], pair["true_of_another"]) for pair in told)
        formats = sorted({image_type for image_type, _ in found})
        return {name: {"true": found[name, True], "known": found[name, True] + found[name, False]} for name in formats}


def select(questions: Sequence[Question], candidates: Iterable[Candidate], rules: Rules) -> Selection:
    """Every question that no pair can be made of, then a verdict on every candidate."""
    selection = Selection()
    for question in questions:
        if found := unfit(question, rules):
            selection.drop(question, *found)
    for candidate in candidates:
        if found := unfit(candidate.question, rules) or judge(candidate, rules):
            selection.drop(candidate.question, *found, candidate.text)
        else:
            selection.keep(candidate)
    return selection


def pair(candidate: Candidate) -> dict[str, Any]:
    """The preference record of a kept answer; the question's further fields are passed on."""
    question = candidate.question
    record = {
        "id": question.id,
        "image": list(question.images),
        "context": messages(question.context) or None,
        "prompt": question.prompt,
        "chosen": question.answer,
        "rejected": candidate.text,
        "gt": question.answer,
        "image_type": question.image_type,
        **target_fields(question.targets),
        "target_box": question.target_box,
        "grid": question.grid,
        "attention_ratio": candidate.attention_ratio,
        "perplexity": candidate.perplexity,
        "rejected_from": candidate.rejected_from,
    }
    if candidate.others:
        record["true_of_another"] = any(
            is_right(candidate.text, other, in_order=compares(question)) for other in candidate.others
        )
    record = {name: value for name, value in record.items() if value is not None}
    return record | {name: value for name, value in question.extra.items() if name not in record}


def write(folder: Path, selection: Selection) -> None:
    """Write the pairs, what was dropped, and the table; each file whole or as it was."""
    write_text(folder / "dropped.jsonl", "".join(json.dumps(line) + "\n" for line in selection.dropped))
    write_text(folder / "summary.md", table(selection))
    write_records(folder / "pairs.json", selection.pairs)


def table(selection: Selection) -> str:
    """Verdicts by format and number of pictures, in Markdown, and what the kept answers are true of."""
    verdicts = selection.verdicts
    rows = sorted({(image_type, number) for image_type, number, _ in verdicts})
    reasons = [KEPT, *sorted({reason for *_, reason in verdicts} - {KEPT})]
    numbers = [[verdicts[*row, reason] for reason in reasons] for row in rows]
    lines = [[*row, sum(own), *own] for row, own in zip(rows, numbers, strict=True)]
    lines.append(["all", "", *(sum(line[column] for line in lines) for column in range(2, 3 + len(reasons)))])
    text = markdown.table(["format", "pictures", "candidates", *reasons], lines) + "\n"
    for name, share in selection.counts()["true_of_another"].items():
        text += f"\n{name}: {share['true']} of {share['known']} rejected answers are true of another image\n"
    return text
