"""Preference pairs without a true answer: `python -m scripts.miniature.study.steered`.

Chosen is what the model answers when AdaptViz steers it to the image asked about. Rejected is what it answers without,
where that is another answer, else what is true of another image of the prompt.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llava.records import DataError, read_answers, read_json
from llava.runtime import ArgumentParser, user_errors, write_text


def main() -> None:
    """Writes OUTPUT/pairs.json and OUTPUT/counts.json."""
    args = parse_args()
    with user_errors():
        records = read_json(args.instructions)
        plain, steered = ({a.question_id: a.text for a in read_answers(path)} for path in (args.plain, args.steered))
        pairs, counts = make_pairs(records, plain, steered, np.random.default_rng(args.seed))
    lines = ",\n".join(json.dumps(pair) for pair in pairs)
    write_text(args.output / "pairs.json", f"[\n{lines}\n]\n")
    write_text(args.output / "counts.json", json.dumps(counts, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--instructions", type=Path, required=True, help="questions with `others`, as make_data's")
    parser.add_argument("--plain", type=Path, required=True, help="answers to them without steering")
    parser.add_argument("--steered", type=Path, required=True, help="answers to them with AdaptViz")
    parser.add_argument("--seed", type=int, default=0, help="of rejected answers that are another image's")
    parser.add_argument("--output", type=Path, required=True, help="folder for pairs.json")
    return parser.parse_args()


def make_pairs(
    records: list[dict], plain: dict[str, str], steered: dict[str, str], rng: np.random.Generator
) -> tuple[list[dict], dict[str, int]]:
    """A pair for every record, and how many were changed by steering and how many chosen answers are true.

    Raises DataError naming the first record that was not answered.
    """
    alike = answers_alike(records)
    pairs, counts = [], {"pairs": len(records), "changed": 0, "chosen_true": 0, "rejected_true": 0}
    for record in records:
        own = record["id"]
        if own not in plain or own not in steered:
            raise DataError([f"{own}: no answer to it; answer the same instructions with and without AdaptViz"])
        chosen, rejected = steered[own], plain[own]
        if rejected == chosen:
            rejected = str(rng.choice(another(chosen, record["others"], alike)))
        else:
            counts["changed"] += 1
        counts["chosen_true"] += chosen == record["answer"]
        counts["rejected_true"] += rejected == record["answer"]
        kept = {name: value for name, value in record.items() if name not in ("answer", "others")}
        pairs.append(kept | {"chosen": chosen, "rejected": rejected, "rejected_from": "steered"})
    return pairs, counts


def another(chosen: str, others: list[str], alike: Mapping[str, set[str]]) -> list[str]:
    """What is true of the other images but `chosen`; if nothing is, what else is answered where `chosen` is."""
    return [text for text in others if text != chosen] or sorted(alike.get(chosen, ())) or ["nothing"]


def answers_alike(records: list[dict]) -> dict[str, set[str]]:
    """For every answer those that stand beside it in some record: other values of the same attribute."""
    alike: dict[str, set[str]] = {}
    for record in records:
        texts = {record["answer"], *record["others"]}
        for text in texts:
            alike.setdefault(text, set()).update(texts - {text})
    return alike


if __name__ == "__main__":
    main()
