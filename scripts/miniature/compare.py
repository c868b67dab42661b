"""Answers of several models to the miniature's test set, side by side.

`python -m scripts.miniature.compare --answers before.jsonl after.jsonl --output DIR`
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from llava.records import read_json
from llava.runtime import user_errors

FORMATS = ("sequence", "collage", "pip", "single")


def main() -> None:
    """Reads the answers, draws scores.png, prints the table; intervals are the evaluation stage's to give."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
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
    """The comparison as text: one row a format, the models side by side."""
    names = list(scores)
    columns = [("accuracy %", "accuracy", ".1f"), ("attention ratio", "attention_ratio", ".3f"),
               ("true of another image %", "true_of_another_image", ".1f")]  # fmt: skip
    width = max(24, 10 * len(names))
    lines = [
        f"{'':<10}{'prompts':>8}  " + "".join(f"|{title:^{width}}" for title, _, _ in columns),
        f"{'format':<10}{'':>8}  " + f"|{''.join(f'{n:>{width // len(names)}}' for n in names)}" * len(columns),
    ]
    for image_type in FORMATS:
        line = f"{image_type:<10}{scores[names[0]][image_type]['prompts']:>8}  "
        for _, key, form in columns:
            # One image holds all image attention: its ratio says nothing.
            is_empty = image_type == "single" and key == "attention_ratio"
            cells = ["-" if is_empty else format(scores[name][image_type][key], form) for name in names]
            line += "|" + "".join(f"{cell:>{width // len(names)}}" for cell in cells)
        lines.append(line)
    return "\n".join(lines)


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
