"""Choose AdaptViz's thresholds and factors on validation questions, and compare it with plain inference on the others:
`python -m inference_optimization.llava_hound_dpo.tune --help`, or by torchrun.

Every scope, rule and factor is tried from one prefill of each prompt. Writes into --output: grid.jsonl (all answers),
tuned.json (the settings chosen, for --config of run_adaptive, with what they were chosen on), table.md.
"""

import argparse
import dataclasses
import json
import logging
import random
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from inference_optimization.llava_hound_dpo.adaptviz import (
    DEFAULTS,
    SCOPES,
    STEPS,
    AdaptViz,
    add_place_arguments,
    place_of,
)
from inference_optimization.llava_hound_dpo.choose import Grid, describe, markdown, rows_of
from inference_optimization.llava_hound_dpo.grid import ANOTHER, PLAIN, Variant, answer_grid
from llava.answering import Job, add_arguments, identify, prepare, run
from llava.records import Question, read_json, texts
from llava.runtime import ArgumentParser, is_main_process, leave, setup_logging, user_errors, write_text
from llava.scaling import RULES
from llava.scorers import SCORERS, resolve, score

logger = logging.getLogger(__name__)

FACTORS = (0.5, 0.8, 1.2, 1.5, 2.0, 3.0)


def main() -> None:
    """Answer the grid, choose on the validation part, report on the rest."""
    args = parse_args()
    setup_logging()
    with user_errors():
        job = prepare(args)
        base = check(args, job)
        variants = variants_of(args)
        tried = {"variants": [f"{v.scope} {v.rule} {v.factor:g}" for v in variants]}
        identity = identify(args, job) | tried | {"scale_heads": base.heads and base.heads.to_json()}
    grid_file = args.output / "grid.jsonl"
    layers = None if base.layers is None else frozenset(base.layers)
    place = layers, base.heads and base.heads.by_layer

    def records_of(model, numbers, batch) -> list[dict[str, Any]]:
        settings = args.max_new_tokens, args.steps == "all", *place
        confidence, answers = answer_grid(model, job.processor.tokenizer, batch, variants, *settings)
        return [
            {"number": number, "question_id": job.questions[number].id, "confidence": own, "texts": given}
            for number, own, given in zip(numbers, confidence, answers, strict=True)
        ]

    run(args, job, identity, grid_file, records_of)
    if is_main_process():
        with user_errors():
            logger.info(report(args, job, base, variants, read_json(grid_file)))
    leave()


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_arguments(parser)
    parser.set_defaults(attention_layers="none", attention_maps=0)
    group = parser.add_argument_group("tuning")
    add = group.add_argument
    add("--share", type=float, default=0.2, help="share of the questions to choose on")
    add("--split_seed", type=int, default=0, help="which questions these are")
    add("--factors", type=float, nargs="+", default=FACTORS, help="factors to try")
    add("--scopes", nargs="+", choices=SCOPES, default=SCOPES, help="scopes to try")
    add("--rules", nargs="+", choices=RULES, default=RULES, help="rules to try")
    add("--steps", choices=STEPS, default="prefill", help="as of run_adaptive")
    add_place_arguments(group)
    add("--per_format", action="store_true", help="choose bands for every format")
    add("--scorer", choices=("auto", *SCORERS), default="auto", help="auto: choice where there are choices, else exact")
    return parser.parse_args()


def check(args: argparse.Namespace, job: Job) -> AdaptViz:
    """The untuned settings, after checking the flags against the test set. Raises ValueError."""
    if args.temperature or args.num_beams > 1:
        raise ValueError("the grid is answered greedily: --temperature and --num_beams do not go with tuning")
    if not 0 < args.share < 1:
        raise ValueError(f"--share {args.share}: a share above 0 and below 1")
    split(len(job.questions), args.share, args.split_seed)
    if min(args.factors) <= 0:
        raise ValueError(f"--factors {min(args.factors)}: a factor must be above 0")
    if args.output.exists() and not args.output.is_dir():
        raise NotADirectoryError(f"--output {args.output} is a file; give a folder")
    scope = "target" if "target" in args.scopes else args.scopes[0]
    base = AdaptViz(scope, steps=args.steps, bands=DEFAULTS[scope], **place_of(args, job))
    base.check(job.questions, job.num_layers, job.num_heads)
    if scope == "all" and len(args.scopes) > 1:
        raise ValueError("scopes that need a target come with `target`: add it to --scopes, or give all alone")
    return base


def variants_of(args: argparse.Namespace) -> list[Variant]:
    """Everything that is tried, plain first; the factors of the defaults always are."""
    found = {Variant(scope, rule, factor) for scope in args.scopes for rule in args.rules for factor in args.factors}
    for scope in args.scopes:
        names = [scope] if scope == "all" else [scope, ANOTHER]
        for factor in (DEFAULTS[scope].alpha_low, DEFAULTS[scope].alpha_high):
            found |= {Variant(name, "multiply", factor) for name in names}
    return [PLAIN, *sorted((v for v in found if v.factor != 1), key=lambda v: (v.scope, v.rule, v.factor))]


def report(args: argparse.Namespace, job: Job, base: AdaptViz, variants: list[Variant], answers: list[dict]) -> str:
    """Choose, write tuned.json and table.md; gives the table. Raises ValueError where a question cannot be scored."""
    grid = scored(args.scorer, job.questions, variants, answers)
    validation = split(len(answers), args.share, args.split_seed)
    others = [scope for scope in args.scopes if scope != base.scope]
    defaults = [base, *(dataclasses.replace(base, scope=scope, bands=DEFAULTS[scope]) for scope in others)]
    pairs = [(scope, rule) for scope in args.scopes for rule in args.rules]
    rows = rows_of(grid.part(validation), grid.part(~validation), defaults, pairs, args.per_format)
    tuned = [row for row in rows if row[0].startswith("AdaptViz")]
    name, settings, on_validation, on_test = max(tuned, key=lambda row: row[2]["mean_of_formats"])
    chosen_on = [question.id for question, is_in in zip(job.questions, validation, strict=True) if is_in]
    record = {
        "adaptviz": settings.to_dict(),
        "chosen": name,
        "validation": on_validation | {"share": args.share, "split_seed": args.split_seed, "ids": chosen_on},
        "test": on_test,
        "all": {row[0]: {"settings": row[1].to_dict(), "validation": row[2], "test": row[3]} for row in rows},
    }
    path = args.output / "tuned.json"
    write_text(path, json.dumps(record, indent=2) + "\n")
    table = markdown([(row[0], describe(row[1]), row[3]) for row in rows])
    head = f"Chosen on {len(chosen_on)} questions, for {path}: {name}. The other {on_test['questions']} questions:\n\n"
    write_text(args.output / "table.md", "# AdaptViz against plain inference\n\n" + head + table)
    return head + table


def scored(scorer: str, questions: Sequence[Question], variants: Sequence[Variant], answers: Sequence[dict]) -> Grid:
    """The grid of scores. Raises ValueError where a question cannot be scored."""
    scores = np.array(
        [[_score(scorer, q, text) for text in a["texts"]] for q, a in zip(questions, answers, strict=True)]
    )
    return Grid(
        np.array([question.image_type for question in questions]),
        np.array([answer["confidence"] for answer in answers]),
        {variant: scores[:, number] for number, variant in enumerate(variants)},
    )


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
