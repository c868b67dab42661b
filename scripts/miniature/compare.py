"""Answers of several models to the miniature's test set, side by side.

`python -m scripts.miniature.compare --answers base.jsonl trained.jsonl --output DIR`
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from llava.records import read_json
from llava.runtime import ArgumentParser, user_errors

FORMATS = ("sequence", "collage", "pip", "single")


def main() -> None:
    """Reads the answers, draws scores.png, prints the table; intervals are the evaluation stage's to give."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--answers", type=Path, nargs="+", required=True, help="answers files; their names are shown")
    parser.add_argument("--output", type=Path, required=True, help="folder for scores.png")
    args = parser.parse_args()
    with user_errors():
        scores = {path.stem: summarize(read_json(path)) for path in args.answers}
    args.output.mkdir(parents=True, exist_ok=True)
    draw(scores, args.output / "scores.png")
    print(table(scores))


def summarize(answers: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Per format: prompts, accuracy (exact word), attention ratio, and answers that are true of another image, in %."""
    scores = {}
    for image_type in FORMATS:
        rows = [row for row in answers if row["image_type"] == image_type]
        scores[image_type] = {
            "prompts": len(rows),
            "accuracy": 100 * mean(row["text"].lower() == row["answer"].lower() for row in rows),
            "attention_ratio": mean(row["attention_ratio"] for row in rows),
            "true_of_another_image": 100 * mean(row["text"] in row["others"] for row in rows),
        }
    return scores


def mean(values) -> float:
    """Arithmetic mean."""
    values = list(values)
    return sum(values) / len(values)


def table(scores: dict[str, dict]) -> str:
    """The comparison as text: a block for each number, one row a format, one column a model."""
    width = max(map(len, scores)) + 2
    blocks = [("accuracy %", "accuracy", ".1f"), ("attention ratio", "attention_ratio", ".3f"),
              ("true of another image %", "true_of_another_image", ".1f")]  # fmt: skip
    lines = []
    for title, key, form in blocks:
        lines.append(f"{title:<24}{'prompts':>8}" + "".join(f"{name:>{width}}" for name in scores))
        for image_type in FORMATS:
            rows = [by_format[image_type] for by_format in scores.values()]
            # One image holds all image attention: its ratio says nothing.
            if image_type != "single" or key == "accuracy":
                cells = "".join(f"{row[key]:>{width}{form}}" for row in rows)
                lines.append(f"  {image_type:<22}{rows[0]['prompts']:>8}{cells}")
        lines.append("")
    return "\n".join(lines).rstrip()


def draw(scores: dict[str, dict], path: Path) -> None:
    """Accuracy and attention ratio per format as bars, one colour a model."""
    matplotlib.use("Agg")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    width = 0.8 / len(scores)
    panels = [("accuracy", "accuracy (%)", 100, FORMATS), ("attention_ratio", "attention ratio", 1, FORMATS[:3])]
    for axis, (key, label, top, shown) in zip(axes, panels, strict=True):
        for number, (name, by_format) in enumerate(scores.items()):
            places = [place + (number + 0.5) * width - 0.4 for place in range(len(shown))]
            axis.bar(places, [by_format[image_type][key] for image_type in shown], width, label=name)
        axis.set(xticks=range(len(shown)), xticklabels=shown, ylim=(0, top), ylabel=label)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(scores), frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
