"""Whether this device computes what a CPU does: the attention term, then a step and answers of a small model."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from llava.checkpoints import open_checkpoint
from llava.generation import generate
from scripts import selftest
from scripts.bench.common import Shape, add_lora, build_pairs
from scripts.bench.steps import difference
from scripts.gpu_check.common import BASE, Finding, Settings, exact, judged, limited
from scripts.gpu_check.models import production_step, prompt_batch
from train.llava_hound_dpo.trainer import METRICS, AttentionAwareDPOTrainer

SECTION = "correctness"
LIMITS = {  # of the relative error against fp32 on a CPU: of the loss, the gradients together, the ratio
    torch.float32: (1e-4, 1e-4, 1e-4),
    torch.bfloat16: (2e-2, 5e-2, 2e-2),
}
TOLD = "this device does not compute what a CPU does: do not train on it before you know why"


def run(settings: Settings) -> Iterator[Finding]:
    """The self-test in both precisions, a step, answers."""
    with exact():
        for dtype in LIMITS:
            for what, problem in selftest.run(open_checkpoint(BASE).family, settings.device, dtype):
                yield judged(SECTION, f"{_name(dtype)}: {what}", problem or "yes", not problem, TOLD)
        yield from steps(settings)
        yield from answers(settings)


def steps(settings: Settings) -> Iterator[Finding]:
    """Loss, gradients and ratio of a row of two pairs."""
    expected = measured("cpu", torch.float32, settings.folder / "cpu")
    for dtype, limits in LIMITS.items():
        found = measured(settings.device, dtype, settings.folder / "device")
        errors = [abs(found[0] / expected[0] - 1), difference(expected[1], found[1]), abs(found[2] / expected[2] - 1)]
        for what, error, limit in zip(("loss", "gradients", "ratio"), errors, limits, strict=True):
            yield limited(SECTION, f"{_name(dtype)}: {what} of a step, from a CPU's", error, limit, TOLD)


def measured(device: str, dtype: torch.dtype, folder: Path) -> tuple[float, dict[str, Tensor], float]:
    """(loss, gradients, ratio) of the small base with LoRA."""
    checkpoint = open_checkpoint(BASE)
    pairs = build_pairs(folder, Shape(images=2, chosen=7, rejected=5, count=2), checkpoint.family)
    base = checkpoint.load()
    torch.manual_seed(0)
    policy = add_lora(base, checkpoint.family, rank=4)  # drawn on the CPU in fp32, or it would be another one
    for parameter in policy.parameters():  # and not its buffers: frequencies stay in fp32, as where bf16 is loaded
        parameter.data = parameter.data.to(dtype)
    step = production_step(policy.to(device), pairs, folder, device, AttentionAwareDPOTrainer)
    loss, gradients = step().item(), {name: gradient.cpu() for name, gradient in step.gradients().items()}
    with torch.no_grad():
        inputs = step.trainer._prepare_inputs(step.batch)
        _, metrics = step.trainer.compute_loss(step.prepared, inputs, return_outputs=True)
    return loss, gradients, metrics[:, METRICS.index("attention/ratio")].mean().item()


def answers(settings: Settings) -> Iterator[Finding]:
    """Greedy answers and where they looked; in bf16 a tie may fall the other way, so there these are only counted."""
    tokens, ratio = said(settings, "cpu", torch.float32)
    for dtype, (_, _, limit) in LIMITS.items():
        found, looked = said(settings, settings.device, dtype)
        same = sum(ours == theirs for ours, theirs in zip(found, tokens, strict=True))
        is_right = same == len(tokens) or dtype != torch.float32
        yield judged(SECTION, f"{_name(dtype)}: greedy answers as on a CPU", f"{same} of {len(tokens)}", is_right, TOLD)
        name = f"{_name(dtype)}: ratio of answers, from a CPU's"
        yield limited(SECTION, name, abs(looked / ratio - 1), limit, TOLD)


def said(settings: Settings, device: str, dtype: torch.dtype) -> tuple[list[list[int]], float]:
    """Tokens of the small base's answers, and the mean ratio of their first."""
    checkpoint = open_checkpoint(BASE)
    model = checkpoint.load(dtype).to(device).eval()
    batch = prompt_batch(checkpoint.family, settings, 6, 2)
    found = [generate(model, checkpoint.family, batch, [2], max_new_tokens=count) for count in (8, 1)]
    return [answer.tokens for answer in found[0]], sum(answer.ratio for answer in found[1]) / len(found[1])


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
