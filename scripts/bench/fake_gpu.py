"""The real code on a GPU that is none: `python -m scripts.bench.fake_gpu` (some minutes on a CPU, no memory)

By model and part: how often Python waits for the GPU (with the lines of code that make it wait), copies that block, and
operations below autograd. Tensors of two devices in one operation end it. Small models have values, and the loss,
gradients and answers must be those of the CPU; 7B and 13B have shapes alone (`posing.py`). Whole micro-batches of one
pair, LoRA, checkpointing; answers to one batch of two prompts. Which kernels a GPU takes this cannot say.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llava.adaptviz import AdaptViz, Bands
from llava.attention import layer_range
from llava.command_line import flag, parse
from llava.families import Family
from llava.generation import PromptBatch, batch_prompts, generate
from llava.markdown import table
from llava.runtime import user_errors
from llava.scaling import Scale
from scripts.bench import common, posing
from scripts.bench.posing import Posing
from scripts.bench.steps import build_trainer
from train.llava_hound_dpo.arguments import ModelArguments
from train.llava_hound_dpo.data import PairDataset
from train.llava_hound_dpo.model import make_trainable
from train.llava_hound_dpo.scoring import Scores
from train.llava_hound_dpo.trainer import AttentionAwareDPOTrainer

COLUMNS = ("model", "part", "waits", "copies that block", "operations", "waits by line")
MODELS = ("llava-tiny", "qwen-tiny", "llava-7b", "llava-13b", "qwen-7b")
SMALL = ("tiny",)
LINES = 6  # of code, of a row of the table


@dataclass(kw_only=True)
class Flags:
    """What is run."""

    models: list[str] = flag("family and size; tiny ones have values, the others shapes", list(MODELS), choices=MODELS)
    images: int = flag("of a prompt", 3)
    new_tokens: int = flag("of an answer", 4)
    publish: bool = flag("append to scripts/bench/RESULTS.md, which git keeps, and not to output/bench/", False)


def main() -> None:
    """Runs all and appends the table."""
    with user_errors():
        (own,) = parse((Flags,), __doc__)
    rows = []
    for model in own.models:
        with tempfile.TemporaryDirectory() as folder:
            for part, found in run_all(Path(folder), *model.split("-"), own.images, own.new_tokens):
                rows.append([model, part, *cells(found)])
    command = f"python -m scripts.bench.fake_gpu --images {own.images} --models {' '.join(own.models)}"
    target = common.PUBLISHED if own.publish else common.RESULTS
    title = "Waits for the GPU, of a micro-batch and of a batch of answers"
    common.record(title, command, table(COLUMNS, rows), target)


def cells(found: Posing) -> list[object]:
    """Cells of a row."""
    shown = [f"{line} {count}" for line, count in found.syncs.most_common(LINES)]
    rest = found.syncs.total() - sum(count for _, count in found.syncs.most_common(LINES))
    lines = ", ".join(shown + [f"others {rest}"] * bool(rest))
    return [found.syncs.total(), found.copies.total(), found.operations, lines]


def run_all(folder: Path, family: str, size: str, images: int, new_tokens: int) -> Iterator[tuple[str, Posing]]:
    """(part, what was noted) of a micro-batch with each kind of reference, and of each kind of answers."""
    bound = common.FAMILIES[family](size)
    pairs = common.build_pairs(folder / "data", common.Shape(images), bound)
    policy = build_policy(bound, size)
    trainer = build_trainer(policy, pairs, folder / "out", FakeTrainer)
    for part, cache in (("reference at every step", None), ("reference from its cache", KnownReference())):
        trainer.reference = cache
        yield part, micro_batch(trainer, trainer.data_collator(step_of(pairs)))[0]
    for part, steer in (("generate", None), ("AdaptViz", boost)):
        yield part, answers(policy, bound, pairs, steer, new_tokens)[0]


def build_policy(family: Family, size: str):
    """A model with LoRA and checkpointing, with values where it is small, else on the meta device in bf16."""
    if size in SMALL:
        return common.add_lora(common.build_base(family), family)
    with torch.device("meta"):
        model = family.model_class(family.config)(copy.deepcopy(family.config)).to(torch.bfloat16)
        policy = make_trainable(model, type(family), ModelArguments("", lora_r=128, lora_alpha=256))
    policy.activation_checkpointing_enable()
    return policy


def boost(confidence: Tensor, batch: PromptBatch) -> Scale:
    """AdaptViz on both prompts; by a confidence that is known, for models without values have none."""
    rule = AdaptViz(bands=Bands.fixed(1.5), scope="balance")
    return rule.steer(torch.full(confidence.shape, 0.5, device=confidence.device), batch)


class FakeTrainer(AttentionAwareDPOTrainer):
    """The trainer on a GPU that is none."""

    def __init__(self, *args, **kwargs):
        kwargs["args"].__dict__["_setup_devices"] = posing.GPU  # what `args.device` remembers
        super().__init__(*args, **kwargs)
        self.current_gradient_accumulation_steps = 1  # as `train` sets it

    def _move_model_to_device(self, model, device):
        posing.pose(model)


def step_of(pairs: PairDataset) -> list[dict]:
    """The items of a step of all pairs, as `SlotDataset` has them."""
    return [item | {"step_pairs": len(pairs)} for item in pairs]


class KnownReference:
    """In place of a `ReferenceCache` that knows every pair."""

    def lookup(self, pairs: Sequence) -> Scores:
        """Some log-probs."""
        chosen, rejected = len(pairs), sum(len(pair.rejected) for pair in pairs)
        return Scores(*(torch.full((size,), logp) for logp in (-9.0, -1.0) for size in (chosen, rejected)))


def micro_batch(trainer: AttentionAwareDPOTrainer, batch: dict) -> tuple[Posing, Tensor]:
    """(what was noted, the loss) of a batch as the loader's thread pins it, backward pass included."""
    trainer.model.zero_grad()
    with Posing() as noted:
        pinned = {name: pin(value) for name, value in batch.items()}
        loss = trainer.training_step(trainer.model, pinned)
    return noted, loss


def pin(value):
    """As `DataLoader(pin_memory=True)`, which asks what is no tensor for its own way."""
    if isinstance(value, dict):
        return {name: pin(inner) for name, inner in value.items()}
    return value.pin_memory() if hasattr(value, "pin_memory") else value


def answers(model, family: Family, pairs: PairDataset, steer: Callable | None, new_tokens: int) -> tuple[Posing, list]:
    """(what was noted, the answers) of two prompts about the pictures of the first pair, one of them padded."""
    pair, pixels, record = pairs[0]["pair"], pairs[0]["pixels"], pairs.pairs[0].record
    images = family.images([pairs.store.open(name).size for name in record.images])
    regions = torch.stack([pair.target, torch.ones_like(pair.target)])
    prompts = [pair.prompt, pair.prompt + pair.prompt[-3:]]
    batch = batch_prompts(
        family, prompts, [images] * 2, [regions] * 2, family.join([pixels] * 2), [record.targets] * 2
    )
    base = model.get_base_model().eval()
    layers = sorted(layer_range(base.config.text_config.num_hidden_layers, "auto"))
    with Posing() as noted:
        batch = batch.pin_memory()
        found = generate(base, family, batch, layers, steer, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    return noted, found


if __name__ == "__main__":
    main()
