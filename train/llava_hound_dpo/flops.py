"""How much a pair costs to train on: floating-point operations from shapes, and hours from them.

Counted are matrix products (2 per multiply-add): the linear layers, the attention products and the vision tower. Left
out is what is less than a percent of them: norms, activations, the softmax, the probe of the attention term, the
optimiser. An estimate to compare settings by, not a measurement.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import LlavaConfig

A100_PEAK = 312e12  # FLOP/s of dense bf16 products, by the data sheet
ATTENTION_BACKWARD = 2.5  # of its forward: five products against two, as fused kernels recompute the scores


@dataclass(frozen=True)
class PairShape:
    """What of a pair's packed row decides its cost. `rejected` is 0 where the loss needs none."""

    shared: int  # tokens before the answers branch off, image tokens included: the prompt without its last
    chosen: int
    rejected: int
    images: int

    @property
    def answers(self) -> int:
        """Rows whose logits are computed."""
        return self.chosen + self.rejected

    @property
    def tokens(self) -> int:
        """Tokens of the packed row."""
        return self.shared + self.answers


@dataclass(frozen=True)
class Recipe:
    """What is computed for every pair. `reference`: "step" (adapter off, with every step), "cache" or "none"."""

    reference: str = "step"
    lora_parameters: int = 0  # 0 with `is_lora`: the base alone
    is_lora: bool = True
    checkpointing: bool = True
    trains_projector: bool = False


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

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def block_parameters(config: LlavaConfig) -> int:
    """Weights of the linear layers of all blocks of the language model: each costs 2 FLOPs per token."""
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    attention = text.hidden_size * (2 * queries + 2 * keys)
    return text.num_hidden_layers * (attention + 3 * text.hidden_size * text.intermediate_size)


def attended_pairs(shape: PairShape) -> float:
    """(query, key) pairs of a packed row: s²/2 of the shared prompt, and a·s + a²/2 of an answer of a tokens."""
    answers = sum(a * shape.shared + a * a / 2 for a in (shape.chosen, shape.rejected))
    return shape.shared**2 / 2 + answers


def attention_flops(config: LlavaConfig, shape: PairShape) -> float:
    """Scores and their product with the values: 2 · 2 · width · layers per (query, key) pair."""
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 4 * text.num_attention_heads * head_dim * text.num_hidden_layers * attended_pairs(shape)


def tower_flops(config: LlavaConfig) -> float:
    """One picture through all blocks of the vision tower: 2 per weight and token, 4 · width · tokens² of attention."""
    vision = config.vision_config
    patches, width = (vision.image_size // vision.patch_size) ** 2, vision.hidden_size
    tokens = patches + 1
    weights = 4 * width**2 + 2 * width * vision.intermediate_size
    blocks = vision.num_hidden_layers * (2 * weights * tokens + 4 * width * tokens**2)
    return blocks + 2 * patches * 3 * vision.patch_size**2 * width


def projector_flops(config: LlavaConfig) -> float:
    """One picture's patches through the projector's two layers."""
    vision, text = config.vision_config, config.text_config
    weights = vision.hidden_size * text.hidden_size + text.hidden_size**2
    return 2 * (vision.image_size // vision.patch_size) ** 2 * weights


def forward_flops(config: LlavaConfig, shape: PairShape) -> float:
    """The language model on a packed row, without pictures: blocks, attention, and the head on answer rows only."""
    return 2 * block_parameters(config) * shape.tokens + attention_flops(config, shape) + head_flops(config, shape)


def head_flops(config: LlavaConfig, shape: PairShape) -> float:
    """Logits of the answer rows."""
    return 2 * config.text_config.hidden_size * config.text_config.vocab_size * shape.answers


def pair_work(config: LlavaConfig, shape: PairShape, recipe: Recipe) -> Work:
    """FLOPs of one pair in one step. With N block weights, K LoRA weights, S tokens, attention T and head H:

    pictures    tower and projector once per image; twice where a trained projector keeps the reference's apart
    forward     2NS + T + H + 2KS
    recomputed  2NS + T + 2KS with checkpointing, else 0
    backward    LoRA: 2NS + H for the inputs, 4KS for the adapter; full: twice 2NS + H; and 2.5 T
    reference   2NS + T + H at every step, 0 from a cache or without DPO
    """
    blocks, attention = 2 * block_parameters(config) * shape.tokens, attention_flops(config, shape)
    head, adapter = head_flops(config, shape), 2 * recipe.lora_parameters * shape.tokens
    encoded = tower_flops(config) + projector_flops(config)
    times = 2 if recipe.trains_projector and recipe.reference == "step" else 1
    backward = (blocks + head + 2 * adapter) if recipe.is_lora else 2 * (blocks + head)
    backward += ATTENTION_BACKWARD * attention
    if recipe.trains_projector:
        backward += shape.images * 2 * projector_flops(config)
    return Work(
        pictures=shape.images * encoded * times,
        forward=blocks + attention + head + adapter,
        recomputed=blocks + attention + adapter if recipe.checkpointing else 0.0,
        backward=backward,
        reference=forward_flops(config, shape) if recipe.reference == "step" else 0.0,
    )


def filling_flops(config: LlavaConfig, shape: PairShape) -> float:
    """One pair's share of filling a reference cache, once: its pictures and a forward pass."""
    return shape.images * (tower_flops(config) + projector_flops(config)) + forward_flops(config, shape)


def epoch_work(config: LlavaConfig, shapes: Sequence[PairShape], recipe: Recipe) -> Work:
    """Sum of `pair_work` over all pairs."""
    return sum((pair_work(config, shape, recipe) for shape in shapes), Work(0, 0, 0, 0, 0))


def hours(flops: float, gpus: int, utilization: float, peak: float = A100_PEAK) -> float:
    """Hours on so many GPUs that each reach this share (0..1) of their peak, recomputation counted as work."""
    return flops / (gpus * peak * utilization) / 3600
