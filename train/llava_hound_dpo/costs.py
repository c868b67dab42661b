"""What training costs in time: FLOPs of a pair, and hours from them. To compare settings by, not measured.

FLOPs are matrix products (2 per multiply-add): of every linear layer by the shape of its weights, of attention by that
of the pictures, of the packed row, and of the probe's second attention call. Left out is what is less than a percent of
them: norms, activations, the softmax, the optimiser.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from llava.families import Family, find_family

A100_PEAK = 312e12  # FLOP/s of dense bf16 products, by the data sheet
ATTENTION_BACKWARD = 2.5  # of its forward: five products against two, as fused kernels recompute the scores


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one forward pass of a model's parts. "attended" is a (query, key) pair: scores, and times the values."""

    patch: float  # through the linear layers of the tower: twice their weights
    patch_attended: float  # in all blocks of the tower that see a whole picture or tile
    projected: float  # an image token, through the projector
    token: float  # through the linear layers of all blocks of the language model
    last: float  # of these the last one of each block
    attended: float  # in all blocks of the language model
    answer: float  # logits of a row
    blocks: int  # of the language model

    def tower(self, shape: "PairShape") -> float:
        """Of a pair's pictures."""
        return sum(self.patch * count + self.patch_attended * count**2 for count in shape.patches)

    def projector(self, shape: "PairShape") -> float:
        """Of a pair's pictures."""
        return self.projected * shape.image_tokens


def count(config: PretrainedConfig) -> ForwardFlops:
    """FLOPs of a model of this config, whatever its family, from its weights' shapes on the meta device."""
    family, text = find_family(config), config.get_text_config()
    with torch.device("meta"):
        model = family.model_class(config)(config)
    width, whole = family.tower_shape(config)
    weights = _linear_weights(model, family)
    tower, projector, blocks, _ = (2 * weights[part] for part in family.parts())
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ForwardFlops(
        patch=tower,
        patch_attended=4 * width * whole,
        projected=projector,
        token=blocks,
        last=2 * sum(
            module.in_features * module.out_features for name, module in model.named_modules()
            if name.endswith("down_proj") and isinstance(module, nn.Linear) and family.part_of(name) == family.language
        ),
        attended=4 * head_size * text.num_attention_heads * text.num_hidden_layers,
        answer=2 * text.hidden_size * text.vocab_size,
        blocks=text.num_hidden_layers,
    )


def _linear_weights(model: nn.Module, family: type[Family]) -> Counter[str]:
    """Weights that a token meets in each part's matrix products; of experts those that one token is sent to."""
    found: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            found[family.part_of(name)] += module.weight.numel()
        elif type(module).__name__.endswith("Experts"):
            text = model.config.get_text_config()
            numbers = sum(parameter.numel() for parameter in module.parameters())
            found[family.part_of(name)] += numbers * text.num_experts_per_tok // text.num_experts
    return found


@dataclass(frozen=True)
class PairShape:
    """What of a pair's packed row decides its cost. `rejected` is empty where the loss needs none."""

    shared: int  # tokens before the answers branch off, image tokens included: the prompt without its last
    chosen: int
    rejected: tuple[int, ...]
    image_tokens: int
    patches: tuple[int, ...]  # of each picture or tile

    @property
    def answers(self) -> int:
        """Rows whose logits are computed."""
        return self.chosen + sum(self.rejected)

    @property
    def tokens(self) -> int:
        """Tokens of the packed row."""
        return self.shared + self.answers

    def attended(self, answer: int) -> float:
        """(query, key) pairs of an answer of so many tokens."""
        return answer * self.shared + answer * answer / 2

    @property
    def attended_pairs(self) -> float:
        """(query, key) pairs of the packed row: of the shared prompt and of each answer's branch."""
        return self.shared**2 / 2 + sum(map(self.attended, (self.chosen, *self.rejected)))


@dataclass(frozen=True)
class Recipe:
    """What is computed for every pair. `reference`: "step" (adapter off, with every step), "cache" or "none"."""

    reference: str = "step"
    lora_parameters: int = 0  # 0 with `is_lora`: the base alone
    is_lora: bool = True
    checkpointing: bool = True
    trains_projector: bool = False
    probed_layers: int = 0


@dataclass(frozen=True)
class Work:
    """FLOPs of one pair in one optimiser step, by what they are for."""

    pictures: float
    forward: float
    recomputed: float
    backward: float
    reference: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(vars(self).values())


def work(costs: ForwardFlops, shapes: Sequence[PairShape], recipe: Recipe) -> Work:
    """FLOPs of all these pairs in one step each. With B of the blocks, T of the attention, P of the probe, H of the
    head, and A of the adapter (2 per weight and token):

    pictures    tower and projector once per image; twice where a trained projector keeps the reference's apart
    forward     B + T + P + H + A
    recomputed  B + T + P + A with checkpointing, else 0; full: less each block's last layer, whose output nobody keeps
    backward    LoRA: B + H for the inputs, 2 A for the adapter; full: twice B + H; and 2.5 (T + P)
    reference   B + T + H at every step, 0 from a cache or without DPO
    """
    tokens = sum(shape.tokens for shape in shapes)
    tower, projector = sum(map(costs.tower, shapes)), sum(map(costs.projector, shapes))
    blocks, head = costs.token * tokens, costs.answer * sum(shape.answers for shape in shapes)
    attention = costs.attended * sum(shape.attended_pairs for shape in shapes)
    probed = costs.attended * recipe.probed_layers / costs.blocks
    probe = probed * sum(shape.attended(shape.chosen) for shape in shapes)
    adapter = 2 * recipe.lora_parameters * tokens
    backward = blocks + head + 2 * adapter if recipe.is_lora else 2 * (blocks + head)
    again = blocks + attention + probe + adapter - (0 if recipe.is_lora else costs.last * tokens)
    if recipe.trains_projector:
        backward += 2 * projector
    seen = 2 if recipe.trains_projector and recipe.reference == "step" else 1
    return Work(
        pictures=seen * (tower + projector),
        forward=blocks + attention + probe + head + adapter,
        recomputed=again if recipe.checkpointing else 0.0,
        backward=backward + ATTENTION_BACKWARD * (attention + probe),
        reference=blocks + attention + head if recipe.reference == "step" else 0.0,
    )


def filling_flops(costs: ForwardFlops, shapes: Sequence[PairShape]) -> float:
    """What filling a reference cache takes, once: the pictures and a forward pass of every pair."""
    found = work(costs, shapes, Recipe("step"))
    return found.pictures + found.reference


def hours(flops: float, gpus: int, utilization: float, peak: float = A100_PEAK) -> float:
    """Hours on so many GPUs that each reach this share (0..1) of their peak, recomputation counted as work."""
    return flops / (gpus * peak * utilization) / 3600
