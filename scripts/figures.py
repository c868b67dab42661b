"""The figures of README and docs, from real numbers: `python -m scripts.figures --output docs/figures`

The miniature's base, and pictures drawn by seed: a packed pair with its mask, region weights and masses, scores of the
last prompt row before and after scaling, the loss. With --demo also where its base and its trained model look.
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

from inference_optimization.llava_hound_dpo.adaptviz import AdaptViz, Bands
from llava import attention
from llava.command_line import flag, parse
from llava.generation import batch_prompts, generate
from llava.heatmap import draw_prompt
from llava.image import ImageStore
from llava.records import Prompt, parse_preference, read_answers, read_questions
from llava.regions import needs_sizes, prompt_regions, target_box, target_weights
from llava.runtime import user_errors
from llava.scaling import scale_scores
from llava.settings import ModelSettings
from scripts.miniature.make_data import preference
from scripts.miniature.prompts import sample_prompt
from train.llava_hound_dpo.losses import hinge_attention, log_attention, sigmoid_loss
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
    with user_errors():
        (own,) = parse((FigureFlags,), __doc__)
        checkpoint = ModelSettings(model_name_or_path=str(BASE), image_folder="").open()
    matplotlib.use("Agg")
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    model, family = checkpoint.load().eval(), checkpoint.family
    own.output.mkdir(parents=True, exist_ok=True)
    figures = {"row": draw_row(family), "mass": draw_mass(model, family), "steering": draw_steering(model, family)}
    figures["loss"] = draw_loss(family)
    if own.demo:
        figures["look"] = draw_look(own.demo)
    for name, figure in figures.items():
        path = own.output / f"{name}.png"
        figure.savefig(path, dpi=110, bbox_inches="tight")
        Image.open(path).convert("RGB").quantize(160).save(path, optimize=True)
        print(path)
    if not own.demo:
        print("look.png is left as it is: it needs --demo")


def draw(seed: int, image_type: str, num_images: int | None = None) -> tuple[Prompt, list[Image.Image]]:
    """A pair of the miniature world and its pictures."""
    rng = np.random.default_rng(seed)
    drawn = sample_prompt(rng, "test", image_type, num_images)
    pictures = drawn.pictures()
    names = [f"{number}.png" for number in range(len(pictures))]
    return parse_preference({"image": names} | preference(drawn, rng), "a drawn pair"), pictures


def packed(family) -> PackedRow:
    """A real pair about three pictures as a row."""
    record, pictures = draw(1, "sequence", 3)
    images = [family.image(picture.size) for picture in pictures]
    chosen, *rejected = (family.encode_answer(record.prompt, text) for text in (record.chosen, *record.rejected))
    prompt = family.expand(family.encode_prompt(record.prompt), images)
    return pack([EncodedPair(prompt, chosen, rejected, target_weights(record, images))], family.image_id)


def colours(row: PackedRow) -> list[str]:
    """What every token of a row is."""
    (tree,) = row.trees
    found = [TARGET if target else IMAGE if image else TEXT for target, image in row.regions[0].tolist()]
    for (start, end), colour in zip(tree.branches, (CHOSEN, REJECTED), strict=True):
        found[start:end] = [colour] * (end - start)
    return found


def visible(row: PackedRow) -> torch.Tensor:
    """(S, S) whether a row sees a key, as `tree_attention` computes it."""
    (tree,) = row.trees
    length, first = row.input_ids.shape[1], tree.branches[0][1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[first:] = tree.mask
    return mask


def strip(axis, row: PackedRow, values, label: str) -> None:
    """A bar for every token, coloured by what it is."""
    axis.bar(range(len(values)), values, color=colours(row), width=1.0)
    axis.set_ylabel(label)
    axis.set_xlim(-0.5, len(values) - 0.5)


def draw_row(family):
    """The packed row: what its tokens are, their positions, who sees whom."""
    row = packed(family)
    figure, axes = plt.subplot_mosaic([["position"] * 2, ["mask", "end"]], figsize=(9, 5), height_ratios=(1, 3),
                                       layout="constrained")  # fmt: skip
    strip(axes["position"], row, row.position_ids[0], "position")
    shown = np.where(visible(row)[..., None], np.array([matplotlib.colors.to_rgb(c) for c in colours(row)]), 1.0)
    length, last = len(shown), 16
    axes["mask"].imshow(shown, interpolation="nearest", aspect="auto")
    axes["mask"].set(xlabel="token looked at", ylabel="token that looks")
    axes["end"].imshow(shown[-last:, -last:], interpolation="nearest", aspect="auto",
                       extent=(length - last, length, length, length - last))  # fmt: skip
    axes["end"].set(title=f"its last {last} tokens", xlabel="token looked at")
    axes["position"].legend(handles=[Patch(color=c, label=n) for n, c in LEGEND.items()], ncols=5, loc="lower center",
                            bbox_to_anchor=(0.5, 1.02), frameon=False)  # fmt: skip
    return figure


def batch_of(family, record: Prompt, pictures: list[Image.Image]):
    """The batch of one prompt."""
    images = [family.image(picture.size) for picture in pictures]
    prompt = family.expand(family.encode_prompt(record.prompt), images)
    regions = [prompt_regions(record, images)]
    return batch_prompts(family, [prompt], regions, family.pixels(pictures), [record.image_type], [True])


def draw_mass(model, family):
    """Region weights of a picture in a picture, the mass on each image token, and the masses by layer."""
    record, (picture,) = draw(3, "pip")
    batch, layers = batch_of(family, record, [picture]), range(model.config.text_config.num_hidden_layers)
    (found,) = generate(model, family, batch, layers, max_new_tokens=8)
    image = family.image(picture.size)
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
    record, pictures = draw(1, "sequence", 3)
    noted = []

    def note(scores, scale, heads=None):
        noted.append((scores, scale_scores(scores, scale, heads)))
        return noted[-1][1]

    steer = AdaptViz(bands=Bands.fixed(1.5)).steer
    with patch.object(attention, "scale_scores", note):
        (found,) = generate(model, family, batch_of(family, record, pictures), [layer], steer, max_new_tokens=1)
    scores = [values[0, head, 0] for values in noted[layer]]
    parts = batch_of(family, record, pictures).regions[0, :, :2]
    colour = [TARGET if target else IMAGE if image else TEXT for target, image in parts.tolist()]
    figure, axes = plt.subplots(2, 2, figsize=(9, 4), sharex=True, sharey="row", layout="constrained")
    for column, (values, title) in enumerate(zip(scores, ("before", f"after, factor {found.factor:g}"), strict=True)):
        masses = values.softmax(dim=-1)
        on = masses @ parts
        axes[0, column].bar(range(len(values)), values, color=colour, width=1.0)
        axes[1, column].bar(range(len(values)), masses, color=colour, width=1.0)
        axes[0, column].set_title(title)
        axes[1, column].set_title(f"target {on[0]:.2f} of {on[1]:.2f} on images: R = {on[0] / on[1]:.2f}", fontsize=9)
        axes[1, column].set_xlabel("prompt token")
    axes[0, 0].set_ylabel("score")
    axes[1, 0].set_ylabel("attention")
    return figure


def draw_loss(family):
    """A row and what is read off it, and the terms as the code computes them."""
    row = packed(family)
    figure, axes = plt.subplot_mosaic([["row"] * 2, ["dpo", "att"]], figsize=(8.4, 3.6), layout="constrained")
    top, left, right = (axes[name] for name in ("row", "dpo", "att"))
    strip(top, row, [1] * row.input_ids.shape[1], "")
    top.set(yticks=[], xticks=[], ylim=(0, 2.6))
    top.spines[:].set_visible(False)
    spans = [*row.trees[0].branches, tuple(row.regions[0, :, 0].nonzero()[[0, -1], 0].tolist())]
    texts = ("log π(chosen)\n→ L_dpo, L_sft", "log π(rejected)\n→ L_dpo", "share R of the image attention\n→ L_att")
    length = row.input_ids.shape[1]
    places = (length - 30, length - 4, sum(spans[2]) / 2)
    for (start, end), text, place in zip(spans, texts, places, strict=True):
        top.annotate(text, ((start + end) / 2, 1.0), (place, 1.6), ha="center", arrowprops={"arrowstyle": "<-"})
    x = torch.linspace(-30, 30, 121)
    left.plot(x, sigmoid_loss(x, 0.1, 0.0), color=CHOSEN)
    left.set(title="L_dpo", xlabel="z: margin over the reference, nats (β 0.1)")
    x = torch.linspace(0.05, 1, 96)
    right.plot(x, hinge_attention(x, 0.75), color=TARGET, label="hinge: max(0, 0.75 - R)")
    right.plot(x, log_attention(x, 0.75), color=TARGET, linestyle=":", label="log: -log R")
    right.set(title="L_att", xlabel="R", ylim=(0, 1.2))
    right.legend(frameon=False)
    return figure


def draw_look(demo: Path):
    """Where base and adapter look, a question of each format: if there is one, that the adapter has mended."""
    questions = {question.id: question for question in read_questions(demo / "data/test.json")}
    answers = {name: {a.question_id: a for a in read_answers(demo / f"answers/{name}.jsonl")} for name in MODELS}
    store = ImageStore(demo / "data/images")
    mapped = [question for id, question in questions.items() if "attention_map" in answers[MODELS[0]][id].extra]
    right = {q.id: [answers[name][q.id].text == q.answer for name in MODELS] for q in mapped}
    mapped.sort(key=lambda question: right[question.id] != [False, True])  # the mended ones first
    asked = [next(q for q in mapped if q.image_type == kind) for kind in ("sequence", "collage", "pip")]
    widths = [len(question.images) for question in asked]
    figure, axes = plt.subplots(2, len(asked), figsize=(8.4, 4.2), width_ratios=widths, layout="constrained")
    for line, name in zip(axes, MODELS, strict=True):
        for axis, question in zip(line, asked, strict=True):
            found, pictures = answers[name][question.id], [store.open(image) for image in question.images]
            box = target_box(question, pictures[0].size) if needs_sizes(question) else None
            axis.imshow(draw_prompt(pictures, found.extra["attention_map"], question.target, box, height=200))
            axis.axis("off")
            text = question.prompt.splitlines()[-1].replace(", ", ",\n") + "\n" if name == MODELS[0] else ""
            axis.set_title(f"{text}{name}: {found.text} (R {found.attention_ratio:.2f})", fontsize=8)
    return figure


if __name__ == "__main__":
    sys.exit(main())
