"""Greedy answers of models to a miniature test set, side by side.

`python -m scripts.miniature.evaluate --data DIR --models base=scripts/miniature/base trained=OUT --output DIR`
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

from llava.attention import layer_range
from llava.checkpoints import load_config, load_model, load_processor
from llava.conversation import encode_prompt
from llava.generation import Answer, batch_prompts, generate
from llava.image import ImageStore, pixel_values
from llava.layout import PatchGrid, expand_images, target_weights
from llava.records import Question, read_questions
from llava.runtime import setup_logging, user_errors

BATCH = 30
FORMATS = ("sequence", "collage", "pip", "single")


def main() -> None:
    """Answers every question with every model, writes answers and scores, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder written by scripts.miniature.make_data")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=PATH", help="checkpoints or adapters")
    parser.add_argument("--output", type=Path, required=True, help="folder for answers and scores")
    args = parser.parse_args()
    setup_logging()
    args.output.mkdir(parents=True, exist_ok=True)
    scores = {}
    with user_errors():
        models = dict(pair.split("=", 1) for pair in args.models)
        questions = [q for name in ("test", "test_single") for q in read_questions(args.data / f"{name}.json")]
        store = ImageStore(args.data / "images")
    for name, path in models.items():
        answers = answer_all(path, questions, store, name)
        write_answers(args.output / f"answers_{name}.jsonl", questions, answers)
        scores[name] = summarize(questions, answers)
    (args.output / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    draw(scores, args.output / "scores.png")
    print(table(scores))


def answer_all(path: str, questions: Sequence[Question], store: ImageStore, label: str) -> list[Answer]:
    """One greedy answer per question, in their order."""
    config, processor = load_config(path), load_processor(path)
    grid = PatchGrid.of(processor.image_processor, config.vision_config, pad=True)
    layers = sorted(layer_range(config.text_config.num_hidden_layers, "auto"))
    model = load_model(path, torch.float32).eval()
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].images))  # little padding in a batch
    answers: dict[int, Answer] = {}
    with tqdm(total=len(questions), desc=f"answers of {label}", unit="prompt") as bar:
        for start in range(0, len(order), BATCH):
            part = [questions[i] for i in order[start : start + BATCH]]
            pictures = [[store.open(image) for image in question.images] for question in part]
            batch = batch_prompts(
                [
                    expand_images(encode_prompt(processor.tokenizer, q.prompt), config.image_token_id, grid.num_tokens)
                    for q in part
                ],
                [target_weights(q, [p.size for p in own], grid) for q, own in zip(part, pictures, strict=True)],
                pixel_values([p for own in pictures for p in own], processor.image_processor, pad=True),
                config.image_token_id,
                processor.tokenizer.pad_token_id,
            )
            found = generate(model, processor.tokenizer, batch, layers, max_new_tokens=8)
            answers |= dict(zip(order[start : start + BATCH], found, strict=True))
            bar.update(len(part))
    return [answers[i] for i in range(len(questions))]


def write_answers(path: Path, questions: Sequence[Question], answers: Sequence[Answer]) -> None:
    """answers.jsonl of design §8."""
    lines = [
        json.dumps(
            {
                "question_id": question.id,
                "text": answer.text,
                "attention_ratio": answer.ratio,
                "attention_ratio_by_layer": answer.ratio_by_layer,
                "confidence": answer.confidence,
                "scale": 1.0,
                "num_tokens": answer.num_tokens,
                "prompt": question.prompt,
                "answer": question.answer,
                "image_type": question.image_type,
                "target": question.target + 1,
                "num_images": len(question.images),
            }
        )
        for question, answer in zip(questions, answers, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def summarize(questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """Per format: prompts, accuracy (exact word), attention ratio, and errors that are true of another image."""
    scores = {}
    for image_type in FORMATS:
        rows = [(q, a) for q, a in zip(questions, answers, strict=True) if q.image_type == image_type]
        right = [a.text.lower() == q.answer.lower() for q, a in rows]
        confused = [a.text in q.extra.get("others", ()) for q, a in rows]
        scores[image_type] = {
            "prompts": len(rows),
            "accuracy": 100 * sum(right) / len(rows),
            "attention_ratio": sum(a.ratio for _, a in rows) / len(rows),
            "true_of_another_image": 100 * sum(confused) / len(rows),
        }
    return scores


def table(scores: dict[str, dict]) -> str:
    """The comparison as text: one row a format, before and after side by side."""
    names = list(scores)
    head = "".join(f"{name:>10}" for name in names)
    lines = [
        f"{'':<10}{'prompts':>8} |{'accuracy %':^{10 * len(names)}} |{'attention ratio':^{10 * len(names)}} "
        f"|{'true of another image %':^{max(23, 10 * len(names))}}",
        f"{'format':<10}{'':>8} |{head} |{head} |{head}",
    ]
    for image_type in FORMATS:
        rows = [scores[name][image_type] for name in names]
        accuracy = "".join(f"{row['accuracy']:>10.1f}" for row in rows)
        # One image holds all image attention: its ratio says nothing.
        ratio = "".join(f"{'-' if image_type == 'single' else format(r['attention_ratio'], '.3f'):>10}" for r in rows)
        confused = "".join(f"{row['true_of_another_image']:>10.1f}" for row in rows)
        lines.append(f"{image_type:<10}{rows[0]['prompts']:>8} |{accuracy} |{ratio} |{confused}")
    return "\n".join(lines)


def draw(scores: dict[str, dict], path: Path) -> None:
    """Accuracy and attention ratio per format as bars, one colour a model."""
    matplotlib.use("Agg")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    width = 0.8 / len(scores)
    for axis, (key, label, top) in zip(
        axes, [("accuracy", "accuracy (%)", 100), ("attention_ratio", "attention ratio", 1)], strict=True
    ):
        shown = FORMATS if key == "accuracy" else FORMATS[:3]
        for number, (name, by_format) in enumerate(scores.items()):
            places = [place + (number + 0.5) * width - 0.4 for place in range(len(shown))]
            axis.bar(places, [by_format[t][key] for t in shown], width, label=name)
        axis.set(xticks=range(len(shown)), xticklabels=shown, ylim=(0, top), ylabel=label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
