"""Does the attention term work with this installation and this checkpoint's shape? Answered on a small random twin."""

from collections.abc import Iterator

import torch
from PIL import Image, ImageDraw
from transformers import LlavaForConditionalGeneration

from llava.attention import Plan, Probe, attention_ratio, install
from llava.families import Family
from train.llava_hound_dpo.packing import EncodedPair, PackedRow, pack
from train.llava_hound_dpo.scoring import Scores, score

LAYER = 1


def run(family: Family) -> Iterator[tuple[str, str]]:
    """(what was tested, problem or "") for every check."""
    model = small_twin(family.config)
    (both, chosen, rejected), pixels = example(model.config)
    yield "region mass equals eager attention", mass_against_eager(model, chosen, pixels)
    yield "the attention term's gradient reaches query and key", gradient_of_term(model, both, pixels)
    yield "a step along the attention term raises the target's share", sign_of_term(model, both, pixels)
    yield "a rejected answer does not see the chosen one", packing(model, both, rejected, pixels)
    yield "target boxes fall on the right image tokens", painted_box(family)


def small_twin(config) -> LlavaForConditionalGeneration:
    """A random model of the same class and patch grid, small enough for seconds on a CPU, with peaky attention."""
    twin = type(config).from_dict(config.to_dict())
    text, vision = twin.text_config, twin.vision_config
    share = max(1, text.num_attention_heads // (text.num_key_value_heads or text.num_attention_heads))
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 64, 96, 3
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 4, max(1, 4 // share), 16
    vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers, vision.num_attention_heads = 32, 64, 3, 2
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(twin)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.mul_(6)
            layer.self_attn.k_proj.weight.mul_(6)
    install(model)
    return model


def example(config) -> tuple[list[PackedRow], dict[str, torch.Tensor]]:
    """A pair about the second of two random pictures as a row, with both answers and with each alone; the pictures."""
    side = config.vision_config.image_size
    tokens = (side // config.vision_config.patch_size) ** 2
    image, target = [config.image_token_id] * tokens, torch.tensor([0.0, 1.0]).repeat_interleave(tokens)
    prompt, chosen, rejected = [1, 11, *image, 12, *image, 13, 14], [21, 22, 23], [31, 32]
    rows = [
        pack([EncodedPair(prompt, *answers, target)], config.image_token_id)
        for answers in ((chosen, [rejected]), (chosen, []), (rejected, []))
    ]
    return rows, {"pixel_values": torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))}


def mass_against_eager(model, row: PackedRow, pixels: dict[str, torch.Tensor]) -> str:
    """Compare the masses that training measures with transformers' own attention maps.

    Without a rejected answer a packed row is prompt and answer, as they stand.
    """
    inputs = {"input_ids": row.input_ids, "attention_mask": torch.ones_like(row.input_ids), **pixels}
    inputs |= {"output_attentions": True, "use_cache": False}
    with torch.no_grad():
        (ours,) = model(**inputs, plan=Plan(row.trees, Probe(row.regions, frozenset({LAYER})))).attentions
        model.set_attn_implementation({"text_config": "eager"})
        theirs = model(**inputs).attentions[LAYER][:, :, -len(row.labels) :] @ row.regions[:, None]
    install(model)
    error = (ours - theirs).abs().max().item()
    return "" if error < 1e-5 else f"largest error {error:.1e}"


def share(scores: Scores) -> torch.Tensor:
    """The attention ratio of the one pair."""
    return attention_ratio(scores.masses).mean()


def gradient_of_term(model, row: PackedRow, pixels: dict[str, torch.Tensor]) -> str:
    """The term alone, with gradient checkpointing as in training."""
    model.train()
    model.activation_checkpointing_enable()
    (1 - share(score(model, row, pixels, layers=frozenset({LAYER})))).backward()
    attention = model.model.language_model.layers[LAYER].self_attn
    norms = [p.weight.grad.norm().item() for p in (attention.q_proj, attention.k_proj)]
    return "" if min(norms) > 0 else f"gradient norms {norms}"


@torch.no_grad()
def sign_of_term(model, row: PackedRow, pixels: dict[str, torch.Tensor]) -> str:
    """One small step against the gradient that `gradient_of_term` left."""
    before = share(score(model, row, pixels, layers=frozenset({LAYER}))).item()
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = sum(p.grad.square().sum() for p in parameters).sqrt()
    for parameter in parameters:
        parameter.sub_(0.05 * parameter.grad / norm)
    after = share(score(model, row, pixels, layers=frozenset({LAYER}))).item()
    return "" if after > before else f"share {before:.4f} before, {after:.4f} after"


@torch.no_grad()
def packing(model, both: PackedRow, alone: PackedRow, pixels: dict[str, torch.Tensor]) -> str:
    """Log-probs of the rejected answer with and without a chosen one before it."""
    error = (score(model, both, pixels).rejected - score(model, alone, pixels).chosen).abs().max().item()
    return "" if error < 1e-4 else f"log-probs differ by {error:.1e}"


def painted_box(family: Family) -> str:
    """Paint a box into a landscape and a portrait picture: the tokens inside it change, those far from it do not."""
    patch = family.side // family.rows
    for size in ((300, 200), (200, 300)):
        box = (60, 50, 140, 150)
        plain, painted = Image.new("RGB", size, "white"), Image.new("RGB", size, "white")
        ImageDraw.Draw(painted).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill="black")
        first, second = (family.pixels([picture])["pixel_values"] for picture in (plain, painted))
        patches = (first - second).abs()[0].amax(0).unfold(0, patch, patch).unfold(1, patch, patch).amax((-1, -2))
        weights = family.image(size).weights(box).view(family.rows, family.rows)
        near = torch.nn.functional.max_pool2d(weights[None], 3, stride=1, padding=1)[0] > 0
        if (patches[weights > 1 - 1e-6] == 0).any() or (patches[~near] > 0).any():
            return f"a box in a {size[0]} x {size[1]} picture changes other tokens than its weights say"
    return ""
