"""What a training step keeps in memory beside weights: of a row's activations, by what autograd saves.

Per token of a row, with h numbers of the residual stream, q of all query heads, f of the feed-forward and r of LoRA, a
block saves: 2 h of its norms' outputs and 2 h of their inputs in fp32; 3 q of queries, keys and values (these as many
as queries) and 2 q of attention's output, before and after heads are joined; 4 f of gate, activation, up and their
product; 7 r. With checkpointing the inputs of all blocks are kept, and one block in full while its backward runs. What
runs without gradient (tower, reference) counts by its own peak alone. `scripts.bench.memory` measures the real code.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from llava.machine import GIB
from llava.run_folder import read_object

FP32 = 4  # bytes
# Bytes per quantised weight. nf4 keeps a constant per 64 weights in 8 bits, and one per 256 of these in 32 bits.
QUANTISED_BYTES = {4: 0.5 + 1 / 64 + 4 / (64 * 256), 8: 1.0}
LIVE_PARAMETERS = SUB_GROUP = 1e9  # DeepSpeed's defaults of stage3_max_live_parameters and sub_group_size
OVERHEAD = 3 * GIB  # of CUDA's context, NCCL and the allocator's gaps on a GPU: assumed, where something must fit


@dataclass(frozen=True)
class Row:
    """What of a row decides the memory of its step: tokens, rows whose logits are computed, patches of its pictures."""

    tokens: int
    answers: int
    patches: int = 0


@dataclass(frozen=True)
class Kept:
    """How a step runs, as far as it decides what is kept."""

    checkpointing: bool = True
    rank: int = 0  # of LoRA; 0: the weights themselves are trained
    probed: tuple[int, ...] = ()  # layers whose attention is measured, with keys in fp32
    dtype_bytes: int = 2
    casts_adapter: bool = False  # fp32 LoRA weights under autocast, as without DeepSpeed


def activation_bytes(config: PretrainedConfig, row: Row, kept: Kept) -> float:
    """Most bytes that a step keeps beside weights: when the backward of the last block starts, or that of the logits.

    Of the logits there are three in fp32 then: log-probs, their gradient, and the gradient of the logits.
    """
    text, vision, size = config.get_text_config(), config.vision_config, kept.dtype_bytes
    hidden, layers = text.hidden_size, text.num_hidden_layers
    probe, block, ends = FP32 * _heads(text)[0], _saved(text, kept), size * hidden
    if kept.checkpointing:
        before = layers * ends
        last = max([before, *((layer + 1) * ends + probe for layer in kept.probed)]) + block
    else:
        before = last = layers * block + probe * len(kept.probed)
    trained = 0 if kept.rank else size * hidden
    backward = row.tokens * (last + _in_flight(text, kept)) + trained * _inner(text)
    logits = row.tokens * (before + (FP32 + size) * hidden) + text.vocab_size * (3 * FP32 * row.answers + trained)
    return max(backward, logits, row.patches * size * 2 * _seen(vision))


def _seen(vision) -> int:
    """Numbers of a patch that the tower has at once, twice each: its pixels, or width and feed-forward."""
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    side = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    inner = getattr(vision, "intermediate_size", None) or 4 * width
    return max(width + inner, 3 * side**2 * (getattr(vision, "temporal_patch_size", None) or 1))


def _saved(text, kept: Kept) -> float:
    """Bytes that a block saves per token."""
    hidden, size, (query, key) = text.hidden_size, kept.dtype_bytes, _heads(text)
    normed = 2 * hidden + (query + key if text.model_type.startswith("qwen3") else 0)  # norms of queries and keys
    in_fp32 = normed - (hidden if size == FP32 and kept.checkpointing else 0)  # the first's input is the block's
    saved = 2 * hidden + 5 * query + _feed_forward(text, kept.rank)[0] + (4 if _experts(text) else 7) * kept.rank
    if not kept.rank:  # weights of norms want what they are multiplied by
        saved += normed
    if kept.casts_adapter:  # queries, keys and values each cast their own input
        saved += 3 * hidden
    return size * saved + FP32 * in_fp32


def _in_flight(text, kept: Kept) -> float:
    """Bytes of gradients per token at the widest place, behind the feed-forward's last layer."""
    numbers = (3 if kept.rank else 2) * text.hidden_size + _feed_forward(text, kept.rank)[1]
    return kept.dtype_bytes * numbers + kept.casts_adapter * FP32 * (text.hidden_size + text.intermediate_size)


def _feed_forward(text, rank: int) -> tuple[float, float]:
    """Numbers per token that a feed-forward saves, and gradients in flight beside them less what they have freed.

    Experts have no LoRA: of all copies of a token, one an expert, those scaled by the router are saved, and in full
    fine-tuning those that go in. Fitted to measurements.
    """
    if not _experts(text):
        return 4 * text.intermediate_size, (2 if rank else 1) * text.intermediate_size
    inner, copies = (text.num_experts_per_tok * size for size in (text.moe_intermediate_size, text.hidden_size))
    if rank:
        return 3 * inner + 1.3 * copies, max(3 * inner - copies, 3 * copies)
    return 4 * inner + 2.3 * copies, max(2 * inner - copies, 3 * copies)


def _inner(text) -> int:
    """Columns of the largest weight of a block."""
    return 2 * text.num_experts * text.moe_intermediate_size if _experts(text) else text.intermediate_size


def _experts(text) -> int:
    return getattr(text, "num_experts", None) or 0


def _heads(text) -> tuple[int, int]:
    """Numbers of all query heads, and of all key heads."""
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return size * text.num_attention_heads, size * (text.num_key_value_heads or text.num_attention_heads)


@dataclass(frozen=True)
class Memory:
    """Estimated bytes per process; `host` is the CPU's memory. Formulas in `estimate_memory`."""

    weights: float
    gradients_and_optimizer: float
    activations: float  # at the longest row
    update: float = 0  # what the optimiser's step adds, when activations are gone
    gathered: float = 0
    host: float = 0

    @property
    def device(self) -> float:
        """Bytes on the GPU, at most."""
        return self.weights + self.gradients_and_optimizer + self.gathered + max(self.activations, self.update)

    def short(self) -> str:
        """The sums alone."""
        return f"{self.device / GIB:.1f} GiB" + (f" and {self.host / GIB:.1f} GiB of the CPU's" if self.host else "")

    def __str__(self) -> str:
        less = "update" if self.activations >= self.update else "activations"
        parts = {name.replace("_", " "): size / GIB for name, size in vars(self).items() if name not in ("host", less)}
        listed = ", ".join(f"{name} {size:.2f}" for name, size in parts.items() if size)
        on_host = f" and {self.host / GIB:.2f} GiB of the CPU's" if self.host else ""
        return f"{self.device / GIB:.2f} GiB ({listed}){on_host}"


@dataclass(frozen=True)
class Zero:
    """What of a DeepSpeed config decides the memory."""

    stage: int = 0
    offloads_parameters: bool = False
    offloads_optimizer: bool = False
    live_parameters: float = LIVE_PARAMETERS  # gathered at once under stage 3
    fp32_gradients: bool = True  # as without DeepSpeed, where trained weights are fp32

    @classmethod
    def read(cls, file: str | None) -> "Zero":
        """Of a config file; of none, no sharing at all. Raises ValueError for one that is no DeepSpeed config."""
        if not file:
            return cls()
        whole = read_object(Path(file))
        zero = whole.get("zero_optimization", {})
        try:
            offloads = (zero.get(f"offload_{part}", {}).get("device", "none") for part in ("param", "optimizer"))
            live = float(zero.get("stage3_max_live_parameters", LIVE_PARAMETERS))
            fp32 = whole.get("data_types", {}).get("grad_accum_dtype") == "fp32"
            return cls(range(4).index(zero.get("stage", 0)), *(device != "none" for device in offloads), live, fp32)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"--deepspeed {file}: no zero_optimization of a stage from 0 to 3 ({error})") from error


@dataclass(frozen=True)
class Numbers:
    """How many numbers a policy has."""

    total: int
    trained: int
    blocks: float = 0  # weights of the language model's blocks: what fewer bits than 16 are of
    bytes_each: int = 2  # as loaded; trained ones have 4 without DeepSpeed


def estimate_memory(
    config: PretrainedConfig, numbers: Numbers, row: Row, kept: Kept, zero: Zero, world: int, bits: int = 16
) -> Memory:
    """Bytes per process, `row` being the longest.

    weights: all parameters, shared out under ZeRO-3, on the CPU with its offload; below 16 bits those of the blocks
    take `QUANTISED_BYTES` each. gathered: what ZeRO-3 brings together at once, at most its live parameters. Gradients
    in the training dtype or fp32, as the config says, shared out from ZeRO-2 on; Adam's two moments and (below fp32) a
    master copy in fp32, shared out from ZeRO-1 on; on the CPU with their offload. Without DeepSpeed trained weights are
    fp32, and several processes keep gradients a second time, in buckets. update: DeepSpeed joins the gradients of a
    step, or of a sub-group under ZeRO-3, in fp32.
    """
    quantised, trained = numbers.blocks if bits < 16 else 0, numbers.trained
    weights = (numbers.total - quantised) * numbers.bytes_each + quantised * QUANTISED_BYTES.get(bits, 0)
    weights /= world if zero.stage == 3 else 1
    gradients = (FP32 if zero.fp32_gradients else kept.dtype_bytes) / (world if zero.stage >= 2 else 1)
    moments = (8 + (FP32 if kept.dtype_bytes < FP32 else 0)) / (world if zero.stage else 1)
    if zero.stage == 0:
        moments = 8 + FP32 - numbers.bytes_each + (FP32 if world > 1 else 0)
    states, joined = trained * (gradients + moments), trained / world if zero.stage else 0
    return Memory(
        weights=0 if zero.offloads_parameters else weights,
        gradients_and_optimizer=0 if zero.offloads_optimizer else states,
        activations=activation_bytes(config, row, kept),
        update=0 if zero.offloads_optimizer else FP32 * (min(joined, SUB_GROUP) if zero.stage == 3 else joined),
        gathered=min(zero.live_parameters, numbers.total) * numbers.bytes_each if zero.stage == 3 else 0,
        host=weights * zero.offloads_parameters + states * zero.offloads_optimizer,
    )
