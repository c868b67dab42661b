"""The figures of README and docs, from real numbers: `python -m scripts.figures --output docs/figures`

The miniature's base, and pictures drawn by seed: a packed pair with its mask and what the loss reads off it, region
weights and masses, scores of the last prompt row before and after scaling. With --demo also where its base and its
trained model look.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Patch
from PIL import Image

from llava import attention
from llava.adaptviz import AdaptViz, Bands
from llava.command_line import flag, parse
from llava.generation import batch_prompts, generate
from llava.heatmap import draw_prompt
from llava.image import ImageStore
from llava.records import parse_preference, read_answers, read_questions
from llava.regions import outlined, pointed_at, prompt_regions, target_weights
from llava.runtime import user_errors
from llava.scaling import scale_scores
from llava.settings import ModelSettings
from scripts.miniature.make_data import preference
from scripts.miniature.prompts import sample_prompt
from train.llava_hound_dpo.packing import EncodedPair, PackedRow, pack

BASE = Path(__file__).parent / "miniature/base"
MODELS = ("base", "trained")
TEXT, IMAGE, TARGET, CHOSEN, REJECTED = "#b8bcc4", "#4c78a8", "#f58518", "#54a24b", "#e45756"
LEGEND = {"text": TEXT, "another image": IMAGE, "image asked about": TARGET, "chosen": CHOSEN, "rejected": REJECTED}


@dataclass(kw_only=True)
class FigureFlags:
    """The command line."""

    output: Path = flag("folder for the PNG files")
    demo: Path | None = flag("folder of a finished demo (output/demo): also draw where both models look", None)


def main() -> None:
    """Draws every figure that the flags allow."""
    matplotlib.use("Agg")
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    with user_errors():
        (own,) = parse((FigureFlags,), __doc__)
        checkpoint = ModelSettings(model_name_or_path=str(BASE), image_folder="").open()
        looks = {"look": draw_look(own.demo)} if own.demo else {}
        own.output.mkdir(parents=True, exist_ok=True)
    model, family = checkpoint.load().eval(), checkpoint.family
    figures = {"row": draw_row(family), "mass": draw_mass(model, family),
               "steering": draw_steering(model, family), **looks}  # fmt: skip
    for name, figure in figures.items():
        path = own.output / f"{name}.png"
        figure.savefig(path, dpi=110, bbox_inches="tight")
        Image.open(path).convert("RGB").quantize(160).save(path, optimize=True)
        print(path)
    if not looks:
        print("look.png is left as it is: it needs --demo")


def sample(family, seed: int, image_type: str, num_images: int | None = None):
    """A pair of the miniature world: its record, its pictures, their image tokens, and the ids of its prompt."""
    rng = np.random.default_rng(seed)
    drawn = sample_prompt(rng, "test", image_type, num_images)
    pictures = drawn.pictures()
    names = [f"{number}.png" for number in range(len(pictures))]
    record = parse_preference({"image": names} | preference(drawn, rng), "a drawn pair")
    images = family.images([picture.size for picture in pictures])
    return record, pictures, images, family.expand(family.encode_prompt(record.prompt), images)


def answered(model, family, pair, layers, **options):
    """The batch of one prompt, and what the model says to it."""
    record, pictures, images, prompt = pair
    regions, pixels = [prompt_regions(record, images)], family.pixels(pictures)
    batch = batch_prompts(family, [prompt], [images], regions, pixels, [pointed_at(record)], [True])
    return batch, generate(model, family, batch, layers, **options)[0]


def packed(family) -> tuple[PackedRow, list[str]]:
    """A real pair about three pictures as a row, and a colour for what each of its tokens is."""
    record, _, images, prompt = sample(family, 1, "sequence", 3)
    chosen, *rejected = (family.encode_answer(record.prompt, text) for text in (record.chosen, *record.rejected))
    row = pack([EncodedPair(prompt, chosen, rejected, target_weights(record, images))], family.image_id)
    found = colours(row.regions[0])
    for (start, end), colour in zip(row.trees[0].branches, (CHOSEN, REJECTED), strict=True):
        found[start:end] = [colour] * (end - start)
    return row, found


def colours(regions: torch.Tensor) -> list[str]:
    """What every token of a prompt is, by its weights (S, 2) in the target and in all images."""
    return [TARGET if target else IMAGE if image else TEXT for target, image in regions.tolist()]


def strip(axis, values, colour: list[str], label: str = "") -> None:
    """A bar for every token, coloured by what it is."""
    axis.bar(range(len(values)), values, color=colour, width=1.0)
    axis.set_ylabel(label)


def draw_row(family):
    """The packed row: what its tokens are, their positions, what each term of the loss reads off it, who sees whom."""
    row, colour = packed(family)
    figure, axes = plt.subplot_mosaic([["position"] * 2, ["mask", "end"]], figsize=(9, 5.4), height_ratios=(2, 3),
                                       layout="constrained")  # fmt: skip
    (tree,), length, last = row.trees, len(colour), 16
    highest = row.positions.max().item()
    strip(axes["position"], row.positions[0, 0], colour, "position")
    axes["position"].set(xlim=(-0.5, length - 0.5), ylim=(0, 2.2 * highest))
    spans = [*tree.branches, tuple(row.regions[0, :, 0].nonzero()[[0, -1], 0].tolist())]
    answers = "log π(chosen)\n→ L_dpo, L_end, L_sft", "log π(rejected)\n→ L_dpo"
    texts = (*answers, "share R of the image attention\n→ L_att")
    places = (length - 30, length - 4, sum(spans[2]) / 2)
    for (start, end), text, place in zip(spans, texts, places, strict=True):
        middle = (start + end) // 2
        axes["position"].annotate(text, (middle, row.positions[0, 0, middle]), (place, 1.5 * highest), ha="center",
                                  arrowprops={"arrowstyle": "<-"})  # fmt: skip
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    visible[tree.branches[0][1] :] = tree.mask  # as `tree_attention` computes it
    shown = np.where(visible[..., None], np.array([matplotlib.colors.to_rgb(c) for c in colour]), 1.0)
    axes["mask"].imshow(shown, interpolation="nearest", aspect="auto")
    axes["mask"].set(xlabel="token looked at", ylabel="token that looks")
    axes["end"].imshow(shown[-last:, -last:], interpolation="nearest", aspect="auto",
                       extent=(length - last, length, length, length - last))  # fmt: skip
    axes["end"].set(title=f"its last {last} tokens", xlabel="token looked at")
    axes["position"].legend(handles=[Patch(color=c, label=n) for n, c in LEGEND.items()], ncols=5, loc="lower center",
                            bbox_to_anchor=(0.5, 1.02), frameon=False)  # fmt: skip
    return figure


def draw_mass(model, family):
    """Region weights of a picture in a picture, the mass on each image token, and the masses by layer."""
    pair, layers = sample(family, 3, "pip"), range(model.config.text_config.num_hidden_layers)
    record, (picture,), (image,), _ = pair
    _, found = answered(model, family, pair, layers, max_new_tokens=8)
    weights, mass = (image.raster(values) for values in (target_weights(record, [image]), found.by_token))
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.6), layout="constrained")
    axes[0].imshow(picture)
    for axis, grid, title in ((axes[1], weights, "weight W of each token"), (axes[2], mass, "attention A, all layers")):
        axis.imshow(grid, cmap="inferno", vmin=0)
        for (y, x), value in np.ndenumerate(grid.numpy()):
            axis.text(x, y, f"{value:.2f}".lstrip("0"), ha="center", va="center", color="#6cf", fontsize=6)
        axis.set_title(title)
    axes[0].set_title("picture")
    for axis in axes[:3]:
        axis.axis("off")
    by_layer = found.masses.numpy()
    axes[3].bar(layers, by_layer[:, 1], color=IMAGE, label="on all images")
    axes[3].bar(layers, by_layer[:, 0], color=TARGET, label="on the target: Σ A·W")
    for layer, ratio in enumerate(found.ratio_by_layer):
        axes[3].text(layer, by_layer[layer, 1], f"R = {ratio:.2f}", ha="center", va="bottom", fontsize=7)
    axes[3].set(title=f"mass by layer, mean R = {found.ratio:.2f}", xlabel="layer", xticks=layers,
                ylim=(0, by_layer[:, 1].max() * 1.5))  # fmt: skip
    axes[3].legend(frameon=False, loc="upper left", fontsize=7)
    return figure


def draw_steering(model, family, layer: int = 2, head: int = 0):
    """Scores of the last prompt row before and after scaling, and the attention that comes of them."""
    noted = []

    def note(scores, scale, heads=None):
        noted.append((scores, scale_scores(scores, scale, heads)))
        return noted[-1][1]

    pair, steer = sample(family, 1, "sequence", 3), AdaptViz(bands=Bands.fixed(1.5)).steer
    with patch.object(attention, "scale_scores", note):
        batch, found = answered(model, family, pair, [layer], steer=steer, max_new_tokens=1)
    parts = batch.regions[0, :, :2]
    figure, axes = plt.subplots(2, 2, figsize=(9, 4), sharex=True, sharey="row", layout="constrained")
    for (above, below), values, title in zip(axes.T, noted[layer], ("before", f"after, factor {found.factor:g}"),
                                             strict=True):  # fmt: skip
        masses = values[0, head, 0].softmax(dim=-1)
        on = masses @ parts
        strip(above, values[0, head, 0], colours(parts), "score" if title == "before" else "")
        strip(below, masses, colours(parts), "attention" if title == "before" else "")
        above.set_title(title)
        below.set_title(f"target {on[0]:.2f} of {on[1]:.2f} on images: R = {on[0] / on[1]:.2f}", fontsize=9)
        below.set_xlabel("prompt token")
    return figure


def draw_look(demo: Path):
    """Where base and adapter look, a question of each format: if there is one, that the adapter has mended."""
    questions = {question.id: question for question in read_questions(demo / "data/test.json")}
    answers = {name: {a.question_id: a for a in read_answers(demo / f"answers/{name}.jsonl")} for name in MODELS}
    store = ImageStore(demo / "data/images")
    mapped = [
        question for id, question in questions.items()
        if all(id in own and "attention_map" in own[id].extra for own in answers.values())
    ]  # fmt: skip
    right = {q.id: [answers[name][q.id].text == q.answer for name in MODELS] for q in mapped}
    mapped.sort(key=lambda question: right[question.id] != [False, True])  # the mended ones first
    first = {question.image_type: question for question in reversed(mapped)}
    if {"sequence", "collage", "pip"} - first.keys():
        raise ValueError(f"{demo}: no answer of every format has its map; a whole demo (bash scripts/demo.sh) has")
    asked = [first[kind] for kind in ("sequence", "collage", "pip")]
    widths = [len(question.images) for question in asked]
    figure, axes = plt.subplots(2, len(asked), figsize=(8.4, 4.2), width_ratios=widths, layout="constrained")
    for line, name in zip(axes, MODELS, strict=True):
        for axis, question in zip(line, asked, strict=True):
            found, pictures = answers[name][question.id], [store.open(image) for image in question.images]
            boxes = outlined(question, pictures[0].size)
            axis.imshow(draw_prompt(pictures, found.extra["attention_map"], question.targets, boxes, height=200))
            axis.axis("off")
            text = question.prompt.splitlines()[-1].replace(", ", ",\n") + "\n" if name == MODELS[0] else ""
            axis.set_title(f"{text}{name}: {found.text} (R {found.attention_ratio:.2f})", fontsize=8)
    return figure


if __name__ == "__main__":
    sys.exit(main())
