"""Answer a multi-image test set with AdaptViz: `python -m inference_optimization.llava_hound_dpo.run_adaptive --help`.

As plain inference (inference/llava_hound_dpo/run_inference.py), and the same answers file, but the attention of the
last prompt token on image tokens is scaled, by a factor that depends on how sure the model is of its first token.
"""

import dataclasses
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.adaptviz import (
    DEFAULTS,
    FEW,
    PRESETS,
    SCOPES,
    STEPS,
    AdaptViz,
    Bands,
    PlaceSettings,
    chosen_on,
    read_config,
)
from llava.answering import Job, answer, digest_of, identify, prepare
from llava.command_line import flag, parse
from llava.runtime import is_main_process, leave, setup_logging, user_errors
from llava.scaling import RULES
from llava.settings import AnswerSettings, ModelSettings, QuestionFiles

logger = logging.getLogger(__name__)

BANDS = {name: name for name in ("alpha_low", "alpha_middle", "alpha_high")} | {
    "confidence_threshold_low": "low",
    "confidence_threshold_high": "high",
}
RULE = {name: name for name in ("scope", "rule", "steps")}


@dataclass(kw_only=True)
class SteeringSettings(PlaceSettings):
    """The rule; what is not given comes from --config, else --preset, else it is the scope's default."""

    _argument_group_name = "AdaptViz (not given: from --config, else --preset, else the scope's default)"

    config: Path | None = flag("settings written by ...llava_hound_dpo.tune", None)
    preset: str | None = flag("a published single-image setting (scope all)", None, choices=sorted(PRESETS))
    scope: str | None = flag(
        "target (default): the tokens of the image asked about; all: every image's; balance: the target's, the "
        "attention on all images together kept", None, choices=SCOPES,
    )  # fmt: skip
    rule: str | None = flag(
        "multiply: score times factor (the paper); add: also raises negative scores", None, choices=list(RULES)
    )
    steps: str | None = flag(
        "prefill: the last prompt token (the paper); all: every decoding step too", None, choices=STEPS
    )
    alpha: float | None = flag("one factor whatever the confidence (ScalingVis)", None)
    confidence_threshold_low: float | None = flag("below it: alpha_low", None)
    confidence_threshold_high: float | None = flag("from it on: alpha_high; between the two: alpha_middle", None)
    alpha_low: float | None = flag("factor of that band; 1 changes nothing", None)
    alpha_middle: float | None = flag("factor of that band; 1 changes nothing", None)
    alpha_high: float | None = flag("factor of that band; 1 changes nothing", None)

    def adaptviz(self, job: Job) -> AdaptViz:
        """What the flags say. Raises ValueError."""
        if self.config and self.preset:
            raise ValueError("--config and --preset both choose the settings: give one of them")
        changed = self._given(BANDS)
        if self.alpha is not None and changed:
            raise ValueError("--alpha is one factor for all confidences: thresholds and band factors do not go with it")
        scope = self.scope or "target"
        if self.config:
            settings = read_config(self.config)
        elif self.preset:
            settings = AdaptViz(scope="all", bands=PRESETS[self.preset])
        else:
            settings = AdaptViz(scope=scope, bands=DEFAULTS[scope])
        bands = dataclasses.replace(settings.bands, **changed) if self.alpha is None else Bands.fixed(self.alpha)
        return dataclasses.replace(settings, bands=bands, **self._given(RULE), **self.place(job))

    def _given(self, names: Mapping[str, str]) -> dict[str, Any]:
        """The flags of `names` that were given, each by the setting's name."""
        return {name: value for flag, name in names.items() if (value := getattr(self, flag)) is not None}


def mark_chosen_on(job: Job, config: Path) -> Job:
    """The job, its questions that the settings were chosen on marked `is_tuned_on`: evaluate does not score them."""
    digests = chosen_on(config)
    marks = [{"is_tuned_on": True} if digest_of(question) in digests else {} for question in job.questions]
    count = sum(map(bool, marks))
    if is_main_process() and 0 < len(digests) < FEW:
        logger.warning("%s was chosen on %d questions: fewer than %d make it a guess", config, len(digests), FEW)
    if is_main_process() and count:
        logger.warning(
            "%d of %d questions are those that %s was chosen on: they are answered and marked `is_tuned_on`, and are "
            "left out of scores", count, len(marks), config,
        )  # fmt: skip
    questions = [dataclasses.replace(q, extra=q.extra | mark) for q, mark in zip(job.questions, marks, strict=True)]
    return dataclasses.replace(job, questions=questions)


def main() -> None:
    """Check, answer what is not answered yet, merge."""
    setup_logging()
    with user_errors():
        groups = (QuestionFiles, SteeringSettings, ModelSettings, AnswerSettings)
        files, steering, model, settings = parse(groups, __doc__)
        job = prepare(model, settings, files.read)
        adaptviz = steering.adaptviz(job)
        adaptviz.check(job)
        job = mark_chosen_on(job, steering.config) if steering.config else job
        identity = identify(job) | {"adaptviz": adaptviz.to_dict()}
    answer(job, files.output, identity, adaptviz.steer)
    leave()


if __name__ == "__main__":
    sys.exit(main())
