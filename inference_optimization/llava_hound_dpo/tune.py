"""Choose AdaptViz's thresholds and factors on validation questions, and compare it with plain inference on the others:
`python -m inference_optimization.llava_hound_dpo.tune --help`, or by torchrun.

Every scope, rule and factor is tried from one prefill of each prompt. Writes into --output: grid.jsonl (all answers),
tuned.json (the settings chosen, for --config of run_adaptive, with what they were chosen on), table.md.

Letters: N questions.
"""

import itertools
import json
import logging
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from inference_optimization.llava_hound_dpo.grid import ANOTHER, PLAIN, Variant, answer_grid
from llava.adaptviz import DEFAULTS, FEW, SCOPES, STEPS, AdaptViz, Bands, PlaceSettings
from llava.answering import Answers, Job, digest_of, identify, prepare
from llava.command_line import flag, parse
from llava.markdown import interval, number, table
from llava.records import FORMATS, Question, read_json, read_questions, texts
from llava.regions import pointed_at
from llava.runtime import check_outputs, is_main_process, leave, setup_logging, user_errors, write_text
from llava.scaling import RULES
from llava.scorers import SCORERS, resolve, score
from llava.settings import AnswerSettings, ModelSettings
from llava.statistics import mcnemar, paired_difference, score_interval

logger = logging.getLogger(__name__)

THRESHOLDS = tuple(round(0.05 * n, 2) for n in range(1, 20))  # of confidence
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
        bad = [factor for factor in self.factors if not (math.isfinite(factor) and factor > 0)]
        if bad:
            raise ValueError(f"--factors {bad[0]}: a factor must be a finite number above 0")
        if self.output.exists() and not self.output.is_dir():
            raise NotADirectoryError(f"--output {self.output} is a file; give a folder")
        check_outputs([self.output / name for name in ("grid.jsonl", "tuned.json", "table.md")], [self.data_path])


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
        job = prepare(model, settings, with_answers(own.data_path))
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


def with_answers(path: str) -> list[Question]:
    """The questions of a test set that say what is right; how many do not is logged. Raises as `read_questions`."""
    questions = read_questions(path)
    known = [question for question in questions if question.answer]
    if not known:
        raise ValueError(f"{path}: no question has a right answer (`answer`): there is nothing to choose on")
    if len(known) < len(questions):
        logger.warning("%d of %d questions have no right answer: left out", len(questions) - len(known), len(questions))
    return known


def answer(job: Job, base: AdaptViz, variants: Sequence[Variant], output: Path, identity: dict) -> None:
    """Write the answers of every question under every variant, going on where a killed run was."""
    layers = None if base.layers is None else frozenset(base.layers)
    how = job.settings.max_new_tokens, base.steps == "all", layers, base.heads and base.heads.by_layer
    answers = Answers(job, output, identity)
    for model, numbers, batch in answers:
        confidence, given = answer_grid(model, job.family, batch, variants, *how)
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
    rows = rows_of(grid.part(validation), grid.part(~validation), base, own.scopes, own.rules)
    tuned = [row for row in rows if row[0].startswith("AdaptViz")]
    name, settings, on_validation, on_test = max(tuned, key=lambda row: row[2]["mean_of_formats"])
    chosen_on = [question for question, is_in in zip(job.questions, validation, strict=True) if is_in]
    digests = {"ids": [question.id for question in chosen_on], "digests": [digest_of(q) for q in chosen_on]}
    record = {
        "adaptviz": settings.to_dict(),
        "chosen": name,
        "is_guess": len(chosen_on) < FEW,
        "validation": on_validation | {"share": own.share, "split_seed": own.split_seed, **digests},
        "test": on_test,
        "all": {row[0]: {"settings": row[1].to_dict(), "validation": row[2], "test": row[3]} for row in rows},
    }
    path = own.output / "tuned.json"
    write_text(path, json.dumps(record, indent=2) + "\n")
    table = markdown([(name, settings, on_test) for name, settings, _, on_test in rows])
    guess = f" Fewer than {FEW} questions make a guess: tune on more." if len(chosen_on) < FEW else ""
    head = f"Chosen on {len(chosen_on)} questions, for {path}: {name}.{guess} "
    head += f"{path.name} names them, and evaluate leaves them out. The other {on_test['questions']} questions:\n\n"
    write_text(own.output / "table.md", "# AdaptViz against plain inference\n\n" + head + table)
    return head + table


def scored(scorer: str, questions: Sequence[Question], variants: Sequence[Variant], answers: Sequence[dict]) -> "Grid":
    """The grid of scores. Raises ValueError where a question cannot be scored."""
    scores = []
    for question, answer in zip(questions, answers, strict=True):
        try:
            choices = texts(question.extra, "choices") or ()
            name = resolve(scorer, choices)
            scores.append([score(name, text, question.answer, choices).score for text in answer["texts"]])
        except ValueError as error:
            raise ValueError(f"{question.where}: {error}") from error
    image_types = np.array([question.image_type for question in questions])
    is_pointed = np.array([bool(pointed_at(question)) for question in questions])
    confidence = np.array([answer["confidence"] for answer in answers])
    return Grid(image_types, is_pointed, confidence, dict(zip(variants, np.array(scores).T, strict=True)))


def split(count: int, share: float, seed: int) -> np.ndarray:
    """(count,) bool: the questions to choose on. Raises ValueError if that leaves nothing on one side."""
    chosen = round(count * share)
    if not 0 < chosen < count:
        raise ValueError(f"--share {share} of {count} questions leaves {chosen} to choose on")
    validation = np.zeros(count, dtype=bool)
    validation[random.Random(seed).sample(range(count), chosen)] = True
    return validation


# ---- arithmetic on a grid of answers


@dataclass(frozen=True)
class Grid:
    """Scores of the same questions under every variant."""

    image_types: np.ndarray  # (N,) of FORMATS
    is_pointed: np.ndarray  # (N,) bool: whether the words point at a target
    confidence: np.ndarray  # (N,) of the plain first token
    scores: dict[Variant, np.ndarray]  # (N,) 0 to 1 each

    def part(self, chosen: np.ndarray) -> "Grid":
        """The chosen questions, by index or by mask."""
        scores = {variant: values[chosen] for variant, values in self.scores.items()}
        return Grid(self.image_types[chosen], self.is_pointed[chosen], self.confidence[chosen], scores)

    @property
    def plain(self) -> np.ndarray:
        """(N,) scores without scaling."""
        return self.scores[PLAIN]

    def factors(self, scope: str, rule: str) -> dict[float, np.ndarray]:
        """(N,) scores by factor, 1.0 among them; the nearest to 1 first, so that ties change least."""
        own = {v.factor: scores for v, scores in self.scores.items() if (v.scope, v.rule) == (scope, rule)}
        if scope != "all":
            own = {factor: np.where(self.is_pointed, scores, self.plain) for factor, scores in own.items()}
        return dict(sorted({**own, 1.0: self.plain}.items(), key=lambda item: abs(np.log(item[0]))))

    def under(self, settings: AdaptViz, scope: str | None = None) -> np.ndarray:
        """(N,) scores that the settings give. Raises KeyError if one of their factors is not in the grid."""
        factors = self.factors(scope or settings.scope, settings.rule)
        chosen = settings.factors(self.confidence, self.is_pointed)
        return np.array([factors[round(factor, 6)][n] for n, factor in enumerate(chosen.tolist())])

    @property
    def weights(self) -> np.ndarray:
        """(N,) so that every multi-image format counts the same, single pictures not at all; sums to 1."""
        counted = sorted(set(self.image_types) - {"single"}) or ["single"]
        share = {name: 1 / (len(counted) * np.count_nonzero(self.image_types == name)) for name in counted}
        return np.array([share.get(name, 0.0) for name in self.image_types])


def best_fixed(grid: Grid, scope: str, rule: str) -> Bands:
    """ScalingVis: the one factor with the highest mean over formats."""
    factors = grid.factors(scope, rule)
    return Bands.fixed(max(factors, key=lambda factor: grid.weights @ factors[factor]))


def best_bands(grid: Grid, scope: str, rule: str, most_bands: int = 3) -> Bands:
    """The thresholds and factors with the highest mean over formats, and of equal ones those that change least.

    Every band's factor is chosen for itself, because no question lies in two of them. Two bands are low = high; with
    three the middle one is left alone.
    """
    factors, weights = grid.factors(scope, rule), grid.weights
    best, best_value = Bands.fixed(1.0), (grid.weights @ grid.plain) + 1e-9
    for low in (0.0, *THRESHOLDS):
        for high in (*(h for h in THRESHOLDS if h >= low), 1.0):
            if most_bands == 2 and low != high:
                continue
            below, above = grid.confidence < low, grid.confidence >= high
            between = ~below & ~above
            value, chosen = weights[between] @ grid.plain[between], []
            for band in (below, above):
                gains = {factor: weights[band] @ scores[band] for factor, scores in factors.items()}
                chosen.append(max(gains, key=gains.get))
                value += gains[chosen[-1]]
            if value > best_value:
                best, best_value = Bands(low, high, chosen[0], chosen[1]), value + 1e-9
    return best


def compare(grid: Grid, scores: np.ndarray) -> dict[str, Any]:
    """What scaled scores are against plain ones: accuracy by format, difference with interval, fixed and broken."""
    difference, low, high = paired_difference(grid.plain, scores)
    fixed, broken = int((scores > grid.plain).sum()), int((scores < grid.plain).sum())
    formats = [name for name in FORMATS if name in set(grid.image_types)]
    ends = score_interval(scores.tolist())
    return {
        "questions": len(scores),
        "accuracy": float(scores.mean()),
        **dict(zip(("accuracy_low", "accuracy_high"), ends, strict=True)),
        "mean_of_formats": float(grid.weights @ scores),
        "relative_gain": float(grid.weights @ scores / max(grid.weights @ grid.plain, 1e-9) - 1),
        "by_format": {name: float(scores[grid.image_types == name].mean()) for name in formats},
        "difference": difference,
        "low": low,
        "high": high,
        "fixed": fixed,
        "broken": broken,
        "mcnemar_p": mcnemar(broken, fixed),
    }


def markdown(rows: Sequence[tuple[str, AdaptViz, dict[str, Any]]]) -> str:
    """Table of (name, settings, `compare`) rows."""
    formats = list(rows[0][2]["by_format"])
    head = ["", "settings", "accuracy %", "mean of multi-image formats", *formats, "difference to plain", "fixed"]
    lines = []
    for name, settings, row in rows:
        accuracy = {"mean": row["accuracy"], "low": row["accuracy_low"], "high": row["accuracy_high"]}
        lines.append([
            name,
            describe(settings.bands),
            interval(accuracy),
            f"{number(row['mean_of_formats'])} ({number(row['relative_gain'], '+.1f')} %)",
            *map(number, row["by_format"].values()),
            interval(row, "difference", "+.1f"),
            *(f"{number(row[name] / row['questions'])} %" for name in ("fixed", "broken")),
        ])  # fmt: skip
    return table([*head, "broken"], lines, left=2) + "\n"


def describe(bands: Bands) -> str:
    """The bands in a few words."""
    parts = [
        (bands.low > 0, bands.alpha_low, f"below {bands.low:g}"),
        (bands.low < bands.high, bands.alpha_middle, "between"),
        (bands.high < 1, bands.alpha_high, f"from {bands.high:g}"),
    ]
    there = [(factor, where) for is_there, factor, where in parts if is_there]
    if len({factor for factor, _ in there}) == 1:
        return f"{there[0][0]:g} always"
    return ", ".join(f"{factor:g} {where}" for factor, where in there if factor != 1)


def rows_of(
    validation: Grid, test: Grid, base: AdaptViz, scopes: Sequence[str], rules: Sequence[str]
) -> list[tuple[str, AdaptViz, dict[str, Any], dict[str, Any]]]:
    """(name, settings, on validation, on test) of everything that is compared.

    `base` is not tuned; if it has a target, it is also pointed at another image on purpose.
    """
    found = [("plain", AdaptViz(bands=Bands.fixed(1.0)), None)]
    for scope in sorted(scopes, key=lambda scope: scope != base.scope):
        found.append((f"default {scope}", replace(base, scope=scope, bands=DEFAULTS[scope]), None))
    if base.scope != "all":
        found.append((f"default {base.scope}, at another image", base, ANOTHER))
    if "all" in scopes and "multiply" in rules:
        bands = best_fixed(validation, "all", "multiply"), best_bands(validation, "all", "multiply", most_bands=2)
        for name, own in zip(("ScalingVis", "AdaptVis"), bands, strict=True):
            found.append((f"{name}, tuned", replace(base, scope="all", bands=own), None))
    for scope, rule in itertools.product(scopes, rules):
        settings = replace(base, scope=scope, rule=rule, bands=best_bands(validation, scope, rule))
        found.append((f"AdaptViz {scope} {rule}, tuned", settings, None))
    return [
        (name, settings, *(compare(grid, grid.under(settings, scope)) for grid in (validation, test)))
        for name, settings, scope in found
    ]


if __name__ == "__main__":
    sys.exit(main())
