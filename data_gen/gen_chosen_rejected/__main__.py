"""Preference pairs from instructions: `python -m data_gen.gen_chosen_rejected --help`, or by torchrun.

A model answers the first question of every instruction, greedily. Its answer becomes the rejected one of a pair if it
is wrong, was not looked up in the right image, and passes the limits below; the true answer is the chosen one.
Writes OUTPUT/pairs.json, dropped.jsonl (every answer that was not used, and why), summary.md, run.json, and the model's
answers.jsonl. Started again, a killed run goes on; with other limits, a finished one selects again without the model.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from data_gen.gen_chosen_rejected.generate import ask, candidates, ready
from data_gen.gen_chosen_rejected.noise import KINDS, Noise
from data_gen.gen_chosen_rejected.others import Answers, other_image, read_source_answers, repointed, truths
from data_gen.gen_chosen_rejected.output import Selection, select, table, write
from data_gen.gen_chosen_rejected.rules import THRESHOLDS, Rules, check_questions, read_thresholds, unfit
from llava.answering import add_model_arguments, positive
from llava.checks import check_pictures
from llava.heads import add_head_arguments
from llava.image import ImageStore
from llava.records import Question, read_instructions, refuse_duplicates
from llava.run_folder import ANOTHER_FOLDER, only_writer, read_object, refuse_another
from llava.runtime import ArgumentParser, is_main_process, leave, setup_logging, user_errors, write_run_json

logger = logging.getLogger("data_gen.gen_chosen_rejected")
MODEL, OTHER_IMAGE = "model", "other_image"
OF_THE_PAIRS = ("instructions", "rejected")  # what a folder of pairs must agree in to be written again


def main() -> None:
    """Check, ask the model what it has not answered yet, select."""
    args = parse_args()
    setup_logging()
    with ExitStack() as stack:
        with user_errors():
            check(args)
            rules = rules_of(args)
            questions = read_instructions(args.instructions)
            refuse_duplicates([(question.id, question.where) for question in questions])
            fit = [question for question in questions if not unfit(question, rules)]
            if not fit:
                raise ValueError(f"{args.instructions}: no pair can be made of any of its {len(questions)} records")
            check_questions(questions, rules, by_attention=args.rejected == MODEL)
            known = read_source_answers(args.source, questions)
            if args.rejected == MODEL:
                own, job = ready(args, fit)
            else:
                check_pictures(fit, ImageStore(args.image_folder), None, "exists")
            if is_main_process():
                stack.enter_context(only_writer(args.output / "pairs"))
        if args.rejected == MODEL:
            ask(own, job, args.output / "answers.jsonl")
        if is_main_process():
            finish(args, rules, make(args, rules, questions, fit, known))
    leave()


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    # fmt: off
    add("--instructions", required=True, help="instructions.jsonl of data_gen.gen_instruction, or a test set")
    add("--output", type=Path, required=True, help="folder to write")
    add("--rejected", choices=[MODEL, OTHER_IMAGE], default=MODEL,
        help="model: its own wrong answers; other_image: the true answer to the same question of another\n"
             "image of the prompt, without any model")
    add("--repoint", action="store_true",
        help="also ask about the other images: what is true there, against what is true of the first one")
    add("--source", nargs="*", default=[],
        help="tables the instructions were made of: they know the answers of the other images\n"
             "(not needed where records have `others`)")
    add("--seed", type=int, default=0, help="of noise and of the choice among other images")
    add_model_arguments(parser, required=False)
    add("--attention_layers", default="auto", help="layers of the attention ratio: auto (16 of 32), 16, 14-22 or 3,5")
    add_head_arguments(parser)
    add("--max_new_tokens", type=positive, default=512, help="tokens of an answer at most")
    add("--degrade", choices=KINDS, default="none",
        help="noise on the pictures while the model answers: on the target, on the whole, or as published\n"
             "(collage: target, pip: whole); the pair has the clean pictures")
    add("--noise_std", type=float, help="of 255 (default as published: collage 225, pip 49, sequence 64)")
    group = parser.add_argument_group("rules", "what is changed here needs no new answers, but for --max_chosen_chars")
    add = group.add_argument
    add("--thresholds", help="highest attention ratio on the target; changes as JSON. Default:\n"
        + json.dumps(THRESHOLDS))
    add("--min_perplexity", type=float, default=Rules.min_perplexity, help="of the model's own answer: it is higher")
    add("--max_chosen_chars", type=int, default=Rules.max_chosen_chars, help="the true answer must be shorter")
    add("--max_length_ratio", type=float, default=Rules.max_length_ratio,
        help="words of the longer answer per word of the shorter")
    add("--min_edit_distance", type=float, default=Rules.min_edit_distance,
        help="between the two, as a share of the longer's characters")
    # fmt: on
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together, and for a folder of other pairs."""
    if args.rejected == MODEL and not args.model_name_or_path:
        raise ValueError("--model_name_or_path is missing: name the model to ask, or take --rejected other_image")
    if args.rejected == OTHER_IMAGE and args.degrade != "none":
        raise ValueError("--degrade is for a model's answers: it does nothing with --rejected other_image")
    if args.noise_std is not None and (args.degrade == "none" or not args.noise_std > 0):
        raise ValueError("--noise_std must be above 0, and needs --degrade target, whole or published")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: must be 0 or more")
    run_json = args.output / "run.json"
    if run_json.is_file():
        found = read_object(run_json).get("arguments") or {}
        there, here = ({name: own.get(name) for name in OF_THE_PAIRS} for own in (found, vars(args)))
        refuse_another(f"the finished run in {args.output}", there, here, ANOTHER_FOLDER)


def rules_of(args: argparse.Namespace) -> Rules:
    """The limits that the flags say. Raises ValueError."""
    if args.max_length_ratio < 1 or not 0 <= args.min_edit_distance < 1:
        raise ValueError("--max_length_ratio must be 1 or more, and --min_edit_distance from 0 to below 1")
    names = ("min_perplexity", "max_chosen_chars", "max_length_ratio", "min_edit_distance")
    return Rules(read_thresholds(args.thresholds), **{name: getattr(args, name) for name in names})


def make(
    args: argparse.Namespace, rules: Rules, questions: Sequence[Question], fit: Sequence[Question], known: Answers
) -> Selection:
    """A verdict on everything that could be a pair."""
    if args.rejected == MODEL:
        noise = Noise(args.degrade, args.noise_std, args.seed)
        made = candidates(fit, args.output / "answers.jsonl", noise, known)
        unknown = []
    else:
        found = [(question, other_image(question, truths(question, known), args.seed)) for question in fit]
        made = [candidate for _, candidate in found if candidate]
        unknown = [question for question, candidate in found if not candidate]
    if args.repoint:
        made += [moved for question in fit for moved in repointed(question, truths(question, known))]
    selection = select(questions, made, rules)
    for question in unknown:
        selection.drop(question, "no answer of another image", {})
    return selection


def finish(args: argparse.Namespace, rules: Rules, selection: Selection) -> None:
    """Write everything and say what came of it."""
    write(args.output, selection)
    arguments: dict[str, Any] = {name: value for name, value in vars(args).items() if name != "thresholds"}
    counts = selection.counts()
    write_run_json(args.output / "run.json", arguments=arguments, thresholds=rules.thresholds, counts=counts)
    logger.info("%s", table(selection))
    logger.info("%s: %d pairs of %d candidates", args.output / "pairs.json", counts["kept"], counts["candidates"])
    if not selection.pairs:
        logger.info("no pair is left: see the reasons in %s", args.output / "dropped.jsonl")


if __name__ == "__main__":
    sys.exit(main())
