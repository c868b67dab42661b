"""What a data set holds and where it comes from: data_card.json for programs, data_card.md for readers."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from data_gen.mix.merge import Item
from llava.run_folder import read_object

NOT_STATED = "not stated"


def describe(parts: dict[str, list[Item]], inputs: Sequence[str], licences: dict[str, str]) -> dict[str, Any]:
    """The card. Raises ValueError if a licence names a subset that does not exist."""
    items = [item for part in parts.values() for item in part]
    subsets = Counter(item.subset for item in items)
    if unknown := sorted(set(licences) - set(subsets)):
        raise ValueError(f"--licence {unknown[0]}: no such subset; there are {', '.join(sorted(subsets))}")
    card = {
        "pairs": {name: len(part) for name, part in parts.items()},
        "by_format": {name: dict(sorted(Counter(map(_format, part)).items())) for name, part in parts.items()},
        "by_target": _by_target(items),
        "by_rejected_from": dict(Counter(item.record.get("rejected_from", NOT_STATED) for item in items)),
        "by_subset": dict(sorted(subsets.items())),
        "licences": {subset: licences.get(subset, NOT_STATED) for subset in sorted(subsets)},
        "without_sources": sum(not item.has_sources for item in items),
        "selection": [_selection(Path(path)) for path in inputs],
    }
    known = [item.record["true_of_another"] for item in items if "true_of_another" in item.record]
    return card | ({"true_of_another": {"true": sum(known), "known": len(known)}} if known else {})


def _format(item: Item) -> str:
    record = item.record
    if record["image_type"] == "collage" and record.get("grid"):
        return f"collage {record['grid'][0] * record['grid'][1]}"
    return f"sequence {len(record['image'])}" if record["image_type"] == "sequence" else record["image_type"]


def _by_target(items: Sequence[Item]) -> dict[str, dict[str, int]]:
    found = Counter((_format(item), said) for item in items if (said := _targets(item.record)))
    by_format: dict[str, dict[str, int]] = {}
    for (name, target), count in sorted(found.items()):
        by_format.setdefault(name, {})[target] = count
    return by_format


def _targets(record: dict[str, Any]) -> str:
    """The numbers as a text, "" where the record says none."""
    return str(record["target"]) if record.get("target") else " and ".join(map(str, record.get("targets") or ()))


def _selection(pairs: Path) -> dict[str, Any]:
    """What the runs that made a file of pairs counted and dropped, as far as their run.json are there.

    Only the last folder of a path is told: a published card has no business with anyone's file system.
    """
    found: dict[str, Any] = {"pairs": f"{pairs.resolve().parent.name}/{pairs.name}"}
    run = _run_json(pairs.parent)
    arguments = run.get("arguments", {})
    if model := arguments.get("model_name_or_path"):
        found["model"] = "/".join(Path(model).parts[-2:])
    found |= {name: run[name] for name in ("thresholds", "counts") if name in run}
    if instructions := arguments.get("instructions"):
        made = _run_json(Path(instructions).parent)
        found |= {"instructions": made["counts"]} if "counts" in made else {}
    return found


def _run_json(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    return read_object(path) if path.is_file() else {}


def readable(card: dict[str, Any], title: str) -> str:
    """The card for readers, in Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"listed": lambda counts: ", ".join(f"{name}: {count}" for name, count in counts.items())}
    return environment.get_template("data_card.md.j2").render(card, title=title).rstrip("\n") + "\n"
