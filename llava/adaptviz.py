"""The rule of AdaptViz: which image tokens are scaled, by what factor, given the confidence of the first answer token.

Source: AdaptVis, "Why Is Spatial Reasoning Hard for VLMs?" (Chen et al. 2025): image attention is smoothed where the
model is unsure and sharpened where it is sure. New here: several images, of which the prompt names some.
"""

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.answering import Job
from llava.attention import layer_range
from llava.command_line import flag
from llava.generation import PromptBatch
from llava.heads import Heads, select_heads
from llava.records import Question
from llava.run_folder import read_object
from llava.runtime import is_main_process
from llava.scaling import RULES, Scale

logger = logging.getLogger(__name__)

SCOPES = ("target", "all", "balance")
STEPS = ("prefill", "all")
FEW = 50  # questions; settings chosen on fewer are a guess


@dataclass(frozen=True)
class Bands:
    """Factor by confidence C: `alpha_low` for C < low, `alpha_high` for C >= high, else `alpha_middle`.

    Two bands, as AdaptVis has them, are low = high. Raises ValueError for thresholds out of order or factors <= 0.
    """

    low: float
    high: float
    alpha_low: float
    alpha_high: float
    alpha_middle: float = 1.0

    def __post_init__(self):
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"thresholds {self.low} and {self.high}: they must be in order, from 0 to 1")
        for name in ("alpha_low", "alpha_middle", "alpha_high"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} {value}: a factor must be above 0 (1 changes nothing)")

    @classmethod
    def fixed(cls, alpha: float) -> "Bands":
        """ScalingVis: one factor, whatever the confidence."""
        return cls(0.0, 0.0, alpha, alpha, alpha)

    def factor(self, confidence: Tensor) -> Tensor:
        """Factor for every confidence."""
        middle = torch.full_like(confidence, self.alpha_middle)
        chosen = torch.where(confidence < self.low, self.alpha_low, middle)
        return torch.where(confidence >= self.high, self.alpha_high, chosen)


# A known target is never smoothed: unsure answers get a boost, sure ones are left alone. "all" is the paper's rule.
DEFAULTS = {
    "target": Bands(low=0.9, high=0.9, alpha_low=1.5, alpha_high=1.0),
    "balance": Bands(low=0.9, high=0.9, alpha_low=1.5, alpha_high=1.0),
    "all": Bands(low=0.3, high=0.7, alpha_low=0.5, alpha_high=2.0),
}
# Published settings of LLaVA-1.5, single image: AdaptVis (a threshold, two weights) and ScalingVis (one weight).
PRESETS = {
    "controlled_a": Bands(0.4, 0.4, 0.5, 1.5),
    "controlled_b": Bands(0.35, 0.35, 0.5, 1.5),
    "coco": Bands(0.3, 0.3, 0.5, 1.2),
    "vg": Bands(0.2, 0.2, 0.5, 2.0),
    "vsr": Bands(0.64, 0.64, 0.5, 1.2),
    "scaling_controlled": Bands.fixed(0.8),
    "scaling_coco": Bands.fixed(1.2),
    "scaling_vg": Bands.fixed(2.0),
    "scaling_vsr": Bands.fixed(0.5),
}


@dataclass(frozen=True)
class AdaptViz:
    """What `generate` is steered with."""

    scope: str = "target"  # which tokens: the target's, all image tokens, or the target's at constant image mass
    rule: str = "multiply"  # or "add", which also raises negative scores
    steps: str = "prefill"  # the last prompt row (the paper), or "all": every decoding step too
    layers: tuple[int, ...] | None = None  # zero-based; None: all
    bands: Bands = DEFAULTS["target"]
    heads: Heads | None = None  # those of `layers` that are scaled; None: all

    def __post_init__(self):
        for name, known in (("scope", SCOPES), ("rule", RULES), ("steps", STEPS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(known)}")

    def factors(self, confidence: Sequence[float], pointed: Sequence[Any]) -> Tensor:
        """Factor of every sample; where nothing is `pointed` at (`pointed_at`), only scope `all` scales."""
        factor = self.bands.factor(torch.as_tensor(confidence))
        for row, parts in enumerate(pointed):
            if not parts and self.scope != "all":
                factor[row] = 1.0
        return factor

    def steer(self, confidence: Tensor, batch: PromptBatch) -> Scale:
        """The scale of a batch, each sample by its own confidence and by what it points at."""
        return Scale.of_last_row(
            self.factors(confidence, batch.pointed),
            batch.regions[..., 1 if self.scope == "all" else 0],
            batch.regions[..., 1] > 0,
            rule=self.rule,
            keeps_mass=self.scope == "balance",
            every_step=self.steps == "all",
            layers=None if self.layers is None else frozenset(self.layers),
            heads=self.heads and self.heads.by_layer,
        )

    def check(self, job: Job) -> None:
        """Raises ValueError where no question has a target to scale, or a layer or head does not exist."""
        without = [question for question in job.questions if not question.targets or question.is_search]
        if self.scope != "all" and without:
            if len(without) == len(job.questions):
                raise ValueError(
                    f"{without[0].where}: no image is referred to, nor in any other question, so there is no target to "
                    "scale: use --scope all"
                )
            if is_main_process():
                say_unscaled(without, len(job.questions))
        if self.layers is not None:
            layer_range(job.checkpoint.num_layers, ",".join(map(str, self.layers)))
        if self.heads is not None:
            self.heads.check(job.checkpoint.num_layers, job.checkpoint.num_heads)
            if self.layers is not None and not self.heads.layers & set(self.layers):
                raise ValueError(f"nothing is scaled: none of the heads {self.heads} is in layers {self.layers}")

    def to_dict(self) -> dict[str, Any]:
        """As `from_dict` reads it."""
        return dataclasses.asdict(self) | {"heads": self.heads and self.heads.to_json()}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "AdaptViz":
        """Settings of a JSON object. Raises ValueError for unknown names and impossible values."""
        raw = dict(raw)
        if raw.pop("by_format", None):
            raise ValueError("bands of their own for some formats (`by_format`) are gone; give `bands` for all")
        unknown = sorted(set(raw) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown setting {unknown[0]!r}")
        try:
            bands = Bands(**raw["bands"]) if "bands" in raw else DEFAULTS.get(raw.get("scope"), DEFAULTS["target"])
        except (TypeError, KeyError) as error:
            raise ValueError(f"bands need low, high, alpha_low, alpha_high (and alpha_middle): {error}") from error
        layers = None if raw.get("layers") is None else tuple(raw["layers"])
        heads = None if raw.get("heads") is None else Heads.from_json(raw["heads"])
        return cls(**{**raw, "bands": bands, "layers": layers, "heads": heads})


def say_unscaled(without: Sequence[Question], count: int) -> None:
    """A line for each reason why some of `count` questions are not scaled."""
    referring, searches = ([q for q in without if q.is_search == is_search] for is_search in (False, True))
    reasons = {"refer to no image": referring, "look for an image, and where it is would be the answer": searches}
    for reason, own in reasons.items():
        if own:
            logger.warning(
                "%d of %d questions %s (%s first): they are answered as by plain inference; "
                "--scope all scales them too", len(own), count, reason, own[0].id,
            )  # fmt: skip


def read_config(path: Path) -> AdaptViz:
    """Settings from a file of the tuner. Raises ValueError, FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: no such file")
    try:
        raw = read_object(path)
        return AdaptViz.from_dict(raw["adaptviz"] if "adaptviz" in raw else raw)
    except (ValueError, TypeError) as error:
        raise ValueError(f"--config {path}: {error}") from error


def chosen_on(path: Path) -> frozenset[str]:
    """Digests of the questions that the settings of a file of the tuner were chosen on. Raises ValueError."""
    found = read_object(path).get("validation") or {}
    digests = found.get("digests", []) if isinstance(found, dict) else None
    if not isinstance(digests, list):
        raise ValueError(f"--config {path}: `validation` must say in `digests` what the settings were chosen on")
    return frozenset(map(str, digests))


@dataclass(kw_only=True)
class PlaceSettings:
    """Where in the model attention is scaled."""

    scale_layers: str | None = flag("layers to scale: a range 8-20 or a list 3,5; default: all", None)
    scale_heads: str | None = flag(
        "file of heads whose best --top_heads alone are scaled, or all; default: that of --attention_heads, else all",
        None,
    )

    def place(self, job: Job) -> dict[str, Any]:
        """The `layers` and `heads` of `AdaptViz` that the flags say; nothing of what they do not. Raises ValueError."""
        among = layer_range(job.checkpoint.num_layers, self.scale_layers) if self.scale_layers else None
        layers = among and tuple(sorted(among))
        place: dict[str, Any] = {"layers": layers} if layers else {}
        file = self.scale_heads or job.settings.attention_heads
        if file == "all":
            return place | {"heads": None}
        if file:
            return {"layers": layers, "heads": select_heads(file, job.settings.top_heads, job.checkpoint, among)}
        return place
