"""What a training process keeps in memory: bytes from shapes, to compare settings by, not a measurement."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from llava.run_folder import read_object

GIB = 1024**3
# Bytes per quantised weight. nf4 keeps a constant per 64 weights in 8 bits, and one per 256 of these in 32 bits.
QUANTISED_BYTES = {4: 0.5 + 1 / 64 + 4 / (64 * 256), 8: 1.0}
LIVE_PARAMETERS = 1e9  # DeepSpeed's default of stage3_max_live_parameters


@dataclass(frozen=True)
class Memory:
    """Estimated bytes per process at the longest batch; `host` is the CPU's memory. Formulas in `estimate_memory`."""

    weights: float
    gradients_and_optimizer: float
    activations: float
    logits: float
    gathered: float = 0
    host: float = 0

    @property
    def device(self) -> float:
        """Bytes on the GPU."""
        return sum(vars(self).values()) - self.host

    def short(self) -> str:
        """The sums alone."""
        return f"{self.device / GIB:.1f} GiB" + (f" and {self.host / GIB:.1f} GiB of the CPU's" if self.host else "")

    def __str__(self) -> str:
        parts = {name.replace("_", " "): size / GIB for name, size in vars(self).items() if name != "host" and size}
        listed = ", ".join(f"{name} {size:.2f}" for name, size in parts.items())
        on_host = f" and {self.host / GIB:.2f} GiB of the CPU's" if self.host else ""
        return f"{self.device / GIB:.2f} GiB ({listed}){on_host}"


@dataclass(frozen=True)
class Zero:
    """What of a DeepSpeed config decides the memory."""

    stage: int = 0
    offloads_parameters: bool = False
    offloads_optimizer: bool = False
    live_parameters: float = LIVE_PARAMETERS  # gathered at once under stage 3

    @classmethod
    def read(cls, file: str | None) -> "Zero":
        """Of a config file; of none, no sharing at all."""
        if not file:
            return cls()
        found = read_object(Path(file)).get("zero_optimization", {})
        parts = (found.get(f"offload_{part}", {}) for part in ("param", "optimizer"))
        offloads = (part.get("device", "none") != "none" for part in parts)
        return cls(found.get("stage", 0), *offloads, float(found.get("stage3_max_live_parameters", LIVE_PARAMETERS)))


def estimate_memory(
    config: PretrainedConfig, num_all: int, num_trained: int, num_blocks: float, tokens: int, answers: int,
    dtype_bytes: int, zero: Zero, world: int, checkpointing: bool, bits: int = 16,
) -> Memory:  # fmt: skip
    """Bytes per process.

    weights: all parameters, shared out under ZeRO-3, on the CPU with its offload; below 16 bits the `num_blocks`
    weights of the blocks take `QUANTISED_BYTES` each. gathered: what ZeRO-3 brings together at once, at most its live
    parameters. Gradients in the training dtype, Adam's two moments and (below fp32) a master copy in fp32 for trained
    ones, shared out from ZeRO-2 on, on the CPU with their offload. Activations per token: the inputs of every block
    when checkpointing plus one block in full, else every block in full; a block keeps about 12 hidden and 3
    feed-forward vectors. Logits at answer rows only, in the training dtype and twice in fp32.
    """
    text = config.get_text_config()
    moments = 8 + (4 if dtype_bytes < 4 else 0)
    block = 12 * text.hidden_size + 3 * text.intermediate_size
    layers = text.num_hidden_layers
    kept = layers * text.hidden_size + block if checkpointing else layers * block
    quantised = num_blocks if bits < 16 else 0
    weights = (num_all - quantised) * dtype_bytes + quantised * QUANTISED_BYTES.get(bits, 0)
    weights /= world if zero.stage == 3 else 1
    states = num_trained * (dtype_bytes + moments) / (world if zero.stage >= 2 else 1)
    gathered = min(zero.live_parameters, num_all) * dtype_bytes if zero.stage == 3 else 0
    return Memory(
        weights=0 if zero.offloads_parameters else weights,
        gradients_and_optimizer=0 if zero.offloads_optimizer else states,
        activations=tokens * kept * dtype_bytes,
        logits=answers * text.vocab_size * (dtype_bytes + 8),
        gathered=gathered,
        host=weights * zero.offloads_parameters + states * zero.offloads_optimizer,
    )
