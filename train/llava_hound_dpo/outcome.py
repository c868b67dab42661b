"""The output folder of a training: what it must not be, and what lies beside the weights, for people to look at."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from llava.markdown import table
from llava.runtime import git_commit, short_commit, write_text

CURVES = {
    "loss": "loss", "rewards/margins": "margin of DPO (rewards)", "attention/ratio": "attention ratio R",
    "logps/chosen": "log-prob of the chosen answers, nats",
}  # fmt: skip
NUMBERS = ("loss", "losses/dpo", "losses/sft", "losses/attention", "attention/ratio", "rewards/margins",
           "rewards/accuracies", "logps/chosen", "logps/chosen_end")  # fmt: skip
UNKNOWN = "that of the base model, which its folder here does not name"
MODEL_FILES = ("config.json", "adapter_config.json")


def check_place(folder: Path, models: Mapping[str, str | None], data: Mapping[str, str | None]) -> None:
    """Raises ValueError where a training would write over what it reads, by flag, or over a model that is not its own.

    Nothing may be written into the folder of a model; other places must only not be the same. Raises OSError where
    the folder cannot be made or written.
    """
    place = folder.resolve()
    for flag, path in {**models, **data}.items():
        own = Path(path).resolve() if path and Path(path).exists() else None
        if own and (place == own or (flag in models and own in place.parents)):
            raise ValueError(f"--output_dir {folder} would write over --{flag} {path}: choose a folder outside of it")
    if not (folder / "run.json").is_file():
        for name in MODEL_FILES:
            if (folder / name).is_file():
                raise ValueError(f"--output_dir {folder} holds another model ({name}): choose another folder")
    there = next(path for path in (place, *place.parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(None, f"{there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(None, f"{there} is not yours to write")


def draw_curves(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """One picture of a trainer's log: loss, margin, attention ratio and chosen log-prob by step; dots: held out."""
    from matplotlib.figure import Figure  # half a second that no other command should wait for

    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        for key, style, label in ((name, "-", "training"), (f"eval_{name}", "o", "held out")):
            points = [(log["step"], log[key]) for log in history if math.isfinite(log.get(key, math.nan))]
            if points:
                axes.plot(*zip(*points, strict=True), style, markersize=4, label=label)
        axes.set(title=title if axes.lines else f"{title}: not of this recipe", xlabel="step")
        if len(axes.lines) > 1:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=100)


def write_card(folder: Path, about: Mapping[str, Any], history: Sequence[Mapping[str, float]]) -> None:
    """README.md of a folder of trained weights: how they came about, by row, and the numbers of the last logged step.

    `about` has `base` (folder or hub name) and `licence` (None: unknown), and rows as they are printed.
    """
    data = ModelCardData(
        base_model=about["base"], license=about["licence"], pipeline_tag="image-text-to-text",
        library_name="peft" if (folder / "adapter_config.json").is_file() else "transformers",
        tags=["llava", "dpo", "attention-aware"],
    )  # fmt: skip
    last = next((log for log in reversed(history) if "loss" in log), {})
    evaluated = next((log for log in reversed(history) if "eval_loss" in log), {})
    rows = {**about, "licence": about["licence"] or UNKNOWN, "code": short_commit(git_commit())}
    numbers = [
        (name, f"{last[name]:.4g}", f"{evaluated[f'eval_{name}']:.4g}" if f"eval_{name}" in evaluated else "")
        for name in NUMBERS if name in last
    ]  # fmt: skip
    write_text(folder / "README.md", f"""---
{data.to_yaml()}
---

# {folder.resolve().name}

Trained with attention-aware preference training; `curves.png` and `run.json` lie beside the finished weights.

{table(("what", "how"), rows.items(), left=2)}

{table((f"at step {last.get('step', 0):,}", "training", "held out"), numbers)}
""")  # fmt: skip


def licence_of(model: Path) -> str | None:
    """What the README.md of a model's folder says; None if there is none, or it says nothing."""
    try:
        return ModelCard.load(model / "README.md").data.license
    except (OSError, ValueError, YAMLError):
        return None
