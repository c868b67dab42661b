"""Does the attention term work with this installation and this checkpoint's shape? Answered on a small random twin."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import nn

from llava.attention import Plan, Probe, attention_ratio, install
from llava.families import Family, ImageTokens, model_inputs
from train.llava_hound_dpo.packing import EncodedPair, PackedRow, pack
from train.llava_hound_dpo.scoring import Scores, score

LAYER = 1
ERRORS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (5e-3, 0.1)}  # at most, of masses and log-probs
SIZES = ((96, 64), (64, 96))  # px of the pictures
PROMPT = "Image1:<image>\nImage2:<image>\nIn Image2, what is shown?"


def run(family: Family, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, str]]:
    """(what was tested, problem or "") for every check, with a twin on this device in this precision."""
    model = small_twin(family).to(device, dtype)
    both, chosen, rejected = (row.to(device) for row in example(family))
    features = encode(family, model)
    yield "region mass equals eager attention", mass_against_eager(model, chosen, features)
    yield "the attention term's gradient reaches query and key", gradient_of_term(family, model, both, features)
    yield "a step along the attention term raises the target's share", sign_of_term(model, both, features)
    yield "a rejected answer does not see the chosen one", packing(model, both, rejected, features)
    yield "target boxes fall on the right image tokens", painted_box(family, model)


def small_twin(family: Family) -> nn.Module:
    """A random model of the same class and picture geometry, small enough for a CPU, with peaky attention."""
    twin = type(family.config).from_dict(family.config.to_dict())
    family.shrink(twin)
    torch.manual_seed(0)
    model = family.model_class(twin)(twin)
    with torch.no_grad():
        for layer in blocks(family, model):
            layer.self_attn.q_proj.weight.mul_(6)
            layer.self_attn.k_proj.weight.mul_(6)
    install(model)
    return model


def blocks(family: Family, model: nn.Module) -> Sequence[nn.Module]:
    """Of the language model."""
    return model.get_submodule(f"model.{family.language}").layers


def example(family: Family) -> list[PackedRow]:
    """A pair about the second of two pictures as a row, with both answers and with each alone."""
    images = family.images(SIZES)
    target = torch.cat([torch.full((len(image.areas),), float(number)) for number, image in enumerate(images)])
    prompt = family.expand(family.encode_prompt(PROMPT), images)
    chosen, rejected = (family.encode_answer(PROMPT, text) for text in ("a red ball", "rain"))
    positions = family.positions(prompt, images)
    return [
        pack([EncodedPair(prompt, *answers, target, positions)], family.image_id)
        for answers in ((chosen, [rejected]), (chosen, []), (rejected, []))
    ]


@torch.no_grad()
def encode(family: Family, model: nn.Module) -> Any:
    """Two pictures of noise."""
    noise = torch.randint(256, (96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    return seen(family, model, [Image.fromarray(noise).resize(size) for size in SIZES])


def seen(family: Family, model: nn.Module, pictures: Sequence[Image.Image]) -> Any:
    """Pictures as the language model reads them."""
    return family.encode(model, {name: pixels.to(model.device) for name, pixels in family.pixels(pictures).items()})


def mass_against_eager(model, row: PackedRow, features: Any) -> str:
    """Compare the masses that training measures with transformers' own attention maps.

    Without a rejected answer a packed row is prompt and answer, as they stand.
    """
    inputs = {"input_ids": row.input_ids, "attention_mask": torch.ones_like(row.input_ids), "output_attentions": True}
    inputs |= {"use_cache": False}
    pictures = [model_inputs(features, row.positions) for _ in range(2)]
    with torch.no_grad():
        plan = Plan(row.trees, Probe(row.regions, frozenset({LAYER})))
        (ours,) = model(**inputs, **pictures[0], plan=plan).attentions
        model.set_attn_implementation({"text_config": "eager"})
        maps = model(**inputs, **pictures[1]).attentions[LAYER][:, :, -len(row.labels) :]
    install(model)
    error = (ours - maps.float() @ row.regions[:, None]).abs().max().item()
    return "" if error < ERRORS[model.dtype][0] else f"largest error {error:.1e}"


def share(scores: Scores) -> torch.Tensor:
    """The attention ratio of the one pair."""
    return attention_ratio(scores.masses).mean()


def gradient_of_term(family: Family, model, row: PackedRow, features: Any) -> str:
    """The term alone, with gradient checkpointing as in training."""
    model.train()
    model.activation_checkpointing_enable()
    (1 - share(score(model, row, features, frozenset({LAYER})))).backward()
    attention = blocks(family, model)[LAYER].self_attn
    norms = [p.weight.grad.norm().item() for p in (attention.q_proj, attention.k_proj)]
    return "" if min(norms) > 0 else f"gradient norms {norms}"


@torch.no_grad()
def sign_of_term(model, row: PackedRow, features: Any) -> str:
    """One small step against the gradient that `gradient_of_term` left."""
    before = share(score(model, row, features, frozenset({LAYER}))).item()
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = sum(p.grad.square().sum() for p in parameters).sqrt()
    for parameter in parameters:
        parameter.sub_(0.05 * parameter.grad / norm)
    after = share(score(model, row, features, frozenset({LAYER}))).item()
    return "" if after > before else f"share {before:.4f} before, {after:.4f} after"


@torch.no_grad()
def packing(model, both: PackedRow, alone: PackedRow, features: Any) -> str:
    """Log-probs of the rejected answer with and without a chosen one before it."""
    error = (score(model, both, features).rejected - score(model, alone, features).chosen).abs().max().item()
    return "" if error < ERRORS[model.dtype][1] else f"log-probs differ by {error:.1e}"


@torch.no_grad()
def painted_box(family: Family, model: nn.Module) -> str:
    """Paint a box into a landscape and a portrait picture: the tokens inside it change, those far from it do not.

    The blocks of the tower hand on what they get, so that a token shows its own pixels and no others.
    """
    tower = model.get_submodule(f"model.{family.tower}")
    for block in max((m for m in tower.modules() if isinstance(m, nn.ModuleList)), key=len):
        block.forward = lambda states, *_, **__: states
    for size in ((300, 200), (200, 300)):
        box = [round(share * side) for share, side in zip((0.2, 0.25, 0.8, 0.9), 2 * size, strict=True)]
        plain, painted = Image.new("RGB", size, "white"), Image.new("RGB", size, "white")
        ImageDraw.Draw(painted).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill="black")
        features = (seen(family, model, [picture]).pooler_output for picture in (plain, painted))
        first, second = (torch.cat([part.flatten(0, -2) for part in parts]) for parts in features)
        changed = (first != second).any(dim=-1).cpu()
        image = family.image(size)
        if not changed[image.weights(box) > 1 - 1e-6].all() or changed[~near(image, box)].any():
            return f"a box in a {size[0]} x {size[1]} picture changes other tokens than its weights say"
    return ""


def near(image: ImageTokens, box: Sequence[float]) -> torch.Tensor:
    """(P,) bool: less than its own width and height away from the box."""
    x0, y0, x1, y1 = image.areas.unbind(dim=1)
    width, height = x1 - x0, y1 - y0
    across = (x1 + width > box[0]) & (x0 - width < box[2])
    return across & (y1 + height > box[1]) & (y0 - height < box[3])
