"""Choose AdaptViz's thresholds and factors on validation questions, and compare it with plain inference on the others:
`python -m inference_optimization.llava_hound_dpo.tune --help`, or by torchrun.

Every scope, rule and factor is tried from one prefill of each prompt. Writes into --output: grid.jsonl (all answers),
tuned.json (the settings chosen, for --config of run_adaptive, with what they were chosen on), table.md.
"""

import dataclasses
import json
import logging
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inference_optimization.llava_hound_dpo.adaptviz import DEFAULTS, SCOPES, STEPS, AdaptViz, PlaceSettings
from inference_optimization.llava_hound_dpo.choose import Grid, markdown, rows_of
from inference_optimization.llava_hound_dpo.grid import ANOTHER, PLAIN, Variant, answer_grid
from llava.answering import Answers, Job, identify, prepare
from llava.command_line import flag, parse
from llava.records import Question, read_json, texts
from llava.runtime import is_main_process, leave, setup_logging, user_errors, write_text
from llava.scaling import RULES
from llava.scorers import SCORERS, resolve, score
from llava.settings import AnswerSettings, ModelSettings

logger = logging.getLogger(__name__)

RETIRED = {"per_format": "one rule holds for all formats; tune on a test set of one format for a rule of its own"}


@dataclass(kw_only=True)
class TuneSettings(PlaceSettings):
    """What is tried, on what, and where the result goes."""

    _argument_group_name = "tuning"

    data_path: str = flag("test set: JSON array or JSONL")
    output: Path = flag("folder to write")
    share: float = flag("share of the questions to choose on", 0.2)
    split_seed: int = flag("which questions these are", 0)
    factors: list[float] = flag("factors to try", [0.5, 0.8, 1.2, 1.5, 2.0, 3.0])
    scopes: list[str] = flag("scopes to try", list(SCOPES), choices=SCOPES)
    rules: list[str] = flag("rules to try", list(RULES), choices=RULES)
    steps: str = flag("as of run_adaptive", "prefill", choices=STEPS)
    scorer: str = flag("auto: choice where there are choices, else exact", "auto", choices=["auto", *SCORERS])

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(f"--share {self.share}: a share above 0 and below 1")
        if min(self.factors) <= 0:
            raise ValueError(f"--factors {min(self.factors)}: a factor must be above 0")
        if self.output.exists() and not self.output.is_dir():
            raise NotADirectoryError(f"--output {self.output} is a file; give a folder")


@dataclass(kw_only=True)
class GridSettings(AnswerSettings):
    """How the grid is answered: nothing is measured meanwhile."""

    attention_layers: str = flag("layers of the attention ratio, which nothing here reads", "none")
    attention_maps: int = flag("questions whose answer keeps its map, which nothing here reads", 0)

    def __post_init__(self):
        super().__post_init__()
        if self.temperature or self.num_beams > 1:
            raise ValueError("the grid is answered greedily: --temperature and --num_beams do not go with tuning")


def main() -> None:
    """Answer the grid, choose on the validation part, report on the rest."""
    setup_logging()
    with user_errors():
        own, model, settings = parse((TuneSettings, ModelSettings, GridSettings), __doc__, retired=RETIRED)
        job = prepare(model, settings, own.data_path)
        base = check(own, job)
        variants = variants_of(own)
        tried = {"variants": [f"{v.scope} {v.rule} {v.factor:g}" for v in variants], "steps": own.steps}
        place = {"scale_layers": base.layers, "scale_heads": base.heads and base.heads.to_json()}
        identity = identify(job) | tried | place
    grid_file = own.output / "grid.jsonl"
    answer(job, base, variants, grid_file, identity)
    if is_main_process():
        with user_errors():
            logger.info(report(own, job, base, variants, read_json(grid_file)))
    leave()


def answer(job: Job, base: AdaptViz, variants: Sequence[Variant], output: Path, identity: dict) -> None:
    """Write the answers of every question under every variant, going on where a killed run was."""
    layers = None if base.layers is None else frozenset(base.layers)
    how = job.settings.max_new_tokens, base.steps == "all", layers, base.heads and base.heads.by_layer
    answers = Answers(job, output, identity)
    for model, numbers, batch in answers:
        confidence, given = answer_grid(model, job.family.tokenizer, batch, variants, *how)
        answers.append([
            {"number": number, "question_id": job.questions[number].id, "confidence": sure, "texts": texts}
            for number, sure, texts in zip(numbers, confidence, given, strict=True)
        ])  # fmt: skip
    answers.finish()


def check(own: TuneSettings, job: Job) -> AdaptViz:
    """The untuned settings, after checking the flags against the test set. Raises ValueError."""
    split(len(job.questions), own.share, own.split_seed)
    scope = "target" if "target" in own.scopes else own.scopes[0]
    base = AdaptViz(scope, steps=own.steps, bands=DEFAULTS[scope], **own.place(job))
    base.check(job)
    if scope == "all" and len(own.scopes) > 1:
        raise ValueError("scopes that need a target come with `target`: add it to --scopes, or give all alone")
    return base


def variants_of(own: TuneSettings) -> list[Variant]:
    """Everything that is tried, plain first; the factors of the defaults always are."""
    found = {Variant(scope, rule, factor) for scope in own.scopes for rule in own.rules for factor in own.factors}
    for scope in own.scopes:
        names = [scope] if scope == "all" else [scope, ANOTHER]
        for factor in (DEFAULTS[scope].alpha_low, DEFAULTS[scope].alpha_high):
            found |= {Variant(name, "multiply", factor) for name in names}
    return [PLAIN, *sorted((v for v in found if v.factor != 1), key=lambda v: (v.scope, v.rule, v.factor))]


def report(own: TuneSettings, job: Job, base: AdaptViz, variants: list[Variant], answers: list[dict]) -> str:
    """Choose, write tuned.json and table.md; gives the table. Raises ValueError where a question cannot be scored."""
    grid = scored(own.scorer, job.questions, variants, answers)
    validation = split(len(answers), own.share, own.split_seed)
    others = [scope for scope in own.scopes if scope != base.scope]
    defaults = [base, *(dataclasses.replace(base, scope=scope, bands=DEFAULTS[scope]) for scope in others)]
    pairs = [(scope, rule) for scope in own.scopes for rule in own.rules]
    rows = rows_of(grid.part(validation), grid.part(~validation), defaults, pairs)
    tuned = [row for row in rows if row[0].startswith("AdaptViz")]
    name, settings, on_validation, on_test = max(tuned, key=lambda row: row[2]["mean_of_formats"])
    chosen_on = [question.id for question, is_in in zip(job.questions, validation, strict=True) if is_in]
    record = {
        "adaptviz": settings.to_dict(),
        "chosen": name,
        "validation": on_validation | {"share": own.share, "split_seed": own.split_seed, "ids": chosen_on},
        "test": on_test,
        "all": {row[0]: {"settings": row[1].to_dict(), "validation": row[2], "test": row[3]} for row in rows},
    }
    path = own.output / "tuned.json"
    write_text(path, json.dumps(record, indent=2) + "\n")
    table = markdown([(name, settings, on_test) for name, settings, _, on_test in rows])
    head = f"Chosen on {len(chosen_on)} questions, for {path}: {name}. The other {on_test['questions']} questions:\n\n"
    write_text(own.output / "table.md", "# AdaptViz against plain inference\n\n" + head + table)
    return head + table


def scored(scorer: str, questions: Sequence[Question], variants: Sequence[Variant], answers: Sequence[dict]) -> Grid:
    """The grid of scores. Raises ValueError where a question cannot be scored."""
    scores = np.array(
        [[_score(scorer, q, text) for text in a["texts"]] for q, a in zip(questions, answers, strict=True)]
    )
    image_types = np.array([question.image_type for question in questions])
    confidence = np.array([answer["confidence"] for answer in answers])
    return Grid(image_types, confidence, dict(zip(variants, scores.T, strict=True)))


def split(count: int, share: float, seed: int) -> np.ndarray:
    """(count,) bool: the questions to choose on. Raises ValueError if that leaves nothing on one side."""
    chosen = round(count * share)
    if not 0 < chosen < count:
        raise ValueError(f"--share {share} of {count} questions leaves {chosen} to choose on")
    validation = np.zeros(count, dtype=bool)
    validation[random.Random(seed).sample(range(count), chosen)] = True
    return validation


def _score(scorer: str, question: Question, text: str) -> float:
    choices = texts(question.extra, "choices") or ()
    try:
        return score(resolve(scorer, choices), text, question.answer, choices).score
    except ValueError as error:
        raise ValueError(f"{question.where}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
