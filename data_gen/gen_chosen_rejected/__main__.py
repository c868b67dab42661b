"""Preference pairs from instructions: `python -m data_gen.gen_chosen_rejected --help`, or by torchrun.

A model answers the first question of every instruction, greedily. Its answer becomes the rejected one of a pair if it
is wrong, was not looked up in the right image, and passes the limits below; the true answer is the chosen one. With
--endpoint a server answers (served.jsonl), and the model here measures its answers.
Writes OUTPUT/pairs.json, dropped.jsonl (every answer that was not used, and why), summary.md, run.json, and the model's
answers.jsonl. Started again, a killed run goes on; with other limits, a finished one selects again without the model.
"""

import json
import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_gen.gen_chosen_rejected.noise import HIDDEN, KINDS, Noise
from data_gen.gen_chosen_rejected.others import Answers, modelled, other_image, read_source_answers, repointed, truths
from data_gen.gen_chosen_rejected.output import Selection, select, table, write
from data_gen.gen_chosen_rejected.rules import THRESHOLDS, Rules, check_questions, read_thresholds, unfit
from llava.answering import Job, answer, identify, prepare
from llava.attention import layer_range
from llava.checks import check_pictures
from llava.command_line import ABOVE_0, BELOW_1, check_numbers, flag, parse
from llava.elsewhere import ServerSettings, answer_by_server, measure_answers, read_given, with_answers
from llava.endpoint import Endpoint
from llava.heads import HeadSettings
from llava.image import ImageStore
from llava.records import Question, read_instructions, read_json, read_preferences, refuse_duplicates
from llava.regions import needs_sizes
from llava.run_folder import ANOTHER_FOLDER, only_writer, read_object, refuse_another
from llava.runtime import check_outputs, is_main_process, leave, setup_logging, user_errors, write_run_json
from llava.settings import AnswerSettings, ModelSettings

logger = logging.getLogger("data_gen.gen_chosen_rejected")
MODEL, OTHER_IMAGE = "model", "other_image"
SELECTION_LAYER = (16, 16)  # of LLaVA-1.5-7B's 32: the layer that MIA-DPO selects by
WRITTEN = ("pairs.json", "dropped.jsonl", "summary.md", "served.jsonl", "answers.jsonl", "run.json")
OF_THE_PAIRS = ("instructions", "rejected", "same_as")  # what a folder of pairs must agree in to be written again


@dataclass(kw_only=True)
class PairSettings:
    """What pairs are made of."""

    _argument_group_name = "pairs"

    instructions: str = flag("instructions.jsonl of data_gen.gen_instruction, or a test set")
    output: Path = flag("folder to write")
    rejected: str = flag(
        "model: its own wrong answers; other_image: the true answer to the same question of another image of the "
        "prompt (of two that are compared: in the other order, or of two others; of one that is sought: another "
        "number), without any model", MODEL, choices=[MODEL, OTHER_IMAGE],
    )  # fmt: skip
    repoint: bool = flag(
        "also ask about the other images: what is true there, against what is true of the first one", False
    )
    source: list[str] = flag(
        "tables the instructions were made of: they know the answers of the other images (not needed where records "
        "have `others`)", [],
    )  # fmt: skip
    same_as: str | None = flag("pairs.json of another run: only its questions, as far as pairs can be made", None)
    seed: int = flag("of noise and of the choice among other images", 0)

    def __post_init__(self):
        check_numbers(self, seed=(0, None))


@dataclass(kw_only=True)
class AskedModel(ModelSettings):
    """The model that is asked, if one is."""

    model_name_or_path: str | None = flag(
        "checkpoint or adapter of any dialect: folder or hub name; none is needed with --rejected other_image", None
    )


@dataclass(kw_only=True)
class AskSettings(HeadSettings):
    """How the model is asked."""

    _argument_group_name = "answers of the model"

    attention_layers: str = flag("layers of the attention ratio: auto (16 of 32), 16, 14-22 or 3,5", "auto")
    max_new_tokens: int = flag("tokens of an answer at most", 512)
    degrade: str = flag(
        "noise on the pictures while the model answers: on the target, on the whole, or as published (collage: target, "
        "pip: whole); hidden: no token sees the target, and no threshold applies; the pair has the clean pictures",
        "none", choices=KINDS,
    )  # fmt: skip
    noise_std: float | None = flag("of 255; default as published: collage 225, pip 49, sequence 64", None)

    def __post_init__(self):
        check_numbers(self, max_new_tokens=(1, None), noise_std=(ABOVE_0, None), top_heads=(1, None))
        if self.noise_std is not None and self.degrade in ("none", HIDDEN):
            raise ValueError("--noise_std needs --degrade target, whole or published")

    def job(self, model: AskedModel, noise: Noise, questions: list[Question]) -> Job:
        """Greedy answers without maps, checked before the weights are loaded. Raises ValueError, FileNotFoundError."""
        names = ("attention_layers", "attention_heads", "top_heads", "max_new_tokens")
        settings = AnswerSettings(attention_maps=0, **{name: getattr(self, name) for name in names})
        job = prepare(model, settings, questions)
        if not job.heads:
            layers = layer_range(job.checkpoint.num_layers, self.attention_layers, SELECTION_LAYER)
            job = replace(job, layers=sorted(layers))
        is_hidden = noise.kind == HIDDEN
        mixed = sum(needs_sizes(question) for question in questions) if is_hidden else 0
        if mixed:
            logger.warning(
                "--degrade hidden: in %d of %d prompts the target is a part of a picture; the tokens beside it are not "
                "hidden and saw it in the vision tower (docs/data.md)", mixed, len(questions),
            )  # fmt: skip
        return replace(job, alter=None if noise.kind in ("none", HIDDEN) else noise, hides_target=is_hidden)


@dataclass(kw_only=True)
class RuleSettings:
    """Which answers are kept."""

    _argument_group_name = "rules (what is changed here needs no new answers, but for --max_chosen_chars)"

    thresholds: str | None = flag(
        f"highest attention ratio on the target; changes as JSON of: {json.dumps(THRESHOLDS)}", None
    )
    min_perplexity: float = flag("of the model's own answer: it is higher", Rules.min_perplexity)
    max_chosen_chars: int = flag("the true answer must be shorter", Rules.max_chosen_chars)
    max_length_ratio: float = flag("words of the longer answer per word of the shorter", Rules.max_length_ratio)
    min_edit_distance: float = flag("between the two, as a share of the longer's characters", Rules.min_edit_distance)

    def __post_init__(self):
        check_numbers(
            self, min_perplexity=(0, None), max_chosen_chars=(1, None), max_length_ratio=(1, None),
            min_edit_distance=(0, BELOW_1),
        )  # fmt: skip

    def rules(self) -> Rules:
        """The limits. Raises ValueError for thresholds that cannot be read."""
        return Rules(**asdict(self) | {"thresholds": read_thresholds(self.thresholds)})


GROUPS = (PairSettings, AskedModel, AskSettings, ServerSettings, RuleSettings)


def main() -> None:
    """Check, ask the model what it has not answered yet, select."""
    setup_logging()
    with ExitStack() as stack:
        with user_errors():
            own, model, asking, server, limits = groups = parse(GROUPS, __doc__)
            check(own, model, asking, server)
            check_outputs([own.output / name for name in WRITTEN], [own.instructions, own.same_as, *own.source])
            rules, noise = limits.rules(), Noise(asking.degrade, asking.noise_std, own.seed)
            questions = chosen(own)
            refuse_duplicates([(question.id, question.where) for question in questions])
            fit = [question for question in questions if not unfit(question, rules)]
            if not fit:
                raise ValueError(f"{own.instructions}: no pair can be made of any of its {len(questions)} records")
            check_questions(questions, rules, by_attention=own.rejected == MODEL and noise.kind != HIDDEN)
            known = read_source_answers(own.source, questions)
            if own.rejected == MODEL:
                job = asking.job(model, noise, fit)
                endpoint = server.open(model.model_name_or_path, job.settings)
            else:
                check_pictures(fit, ImageStore(model.image_folder), None, "exists")
            if is_main_process():
                stack.enter_context(only_writer(own.output / "pairs"))
        if own.rejected == MODEL:
            ask(job, endpoint, server.endpoint_workers, own.output, asdict(noise))
        if is_main_process():
            selection = make(own, noise, rules, questions, fit, known)
            arguments = {name: value for group in groups for name, value in asdict(group).items()}
            finish(own.output, arguments, rules, selection)
    leave()


def chosen(own: PairSettings) -> list[Question]:
    """The questions that pairs are made of. Raises DataError, FileNotFoundError, ValueError."""
    questions = read_instructions(own.instructions)
    if own.same_as is None:
        return questions
    wanted = {pair.id for pair in read_preferences(own.same_as)}
    kept = [question for question in questions if question.id in wanted]
    if not kept:
        raise ValueError(f"--same_as {own.same_as}: none of its pairs is about a question of {own.instructions}")
    return kept


def check(own: PairSettings, model: AskedModel, asking: AskSettings, server: ServerSettings) -> None:
    """Raise ValueError for flags that do not go together, and for a folder of other pairs."""
    if own.rejected == MODEL and not model.model_name_or_path:
        raise ValueError("--model_name_or_path is missing: name the model to ask, or take --rejected other_image")
    for name, is_given in (("degrade", asking.degrade != "none"), ("endpoint", server.endpoint)):
        if own.rejected == OTHER_IMAGE and is_given:
            raise ValueError(f"--{name} is for a model's answers: it does nothing with --rejected other_image")
    if asking.degrade == HIDDEN and server.endpoint:
        raise ValueError("--degrade hidden: a server sees every picture; drop --endpoint and the model here answers")
    run_json = own.output / "run.json"
    if run_json.is_file():
        found = read_object(run_json).get("arguments") or {}
        there, here = ({name: given.get(name) for name in OF_THE_PAIRS} for given in (found, asdict(own)))
        refuse_another(f"the finished run in {own.output}", there, here, ANOTHER_FOLDER)


def ask(job: Job, endpoint: Endpoint | None, workers: int, folder: Path, noise: dict[str, Any]) -> None:
    """Write answers.jsonl: the model's own answers, or a server's as the model sees them."""
    if endpoint:
        answer_by_server(job, endpoint, workers, folder / "served.jsonl", noise=noise)
        with user_errors():
            job = with_answers(job, read_given(folder / "served.jsonl"))
        measure_answers(job, folder / "answers.jsonl", identify(job) | {"noise": noise})
    else:
        answer(job, folder / "answers.jsonl", identify(job) | {"noise": noise})


def make(
    own: PairSettings, noise: Noise, rules: Rules, questions: Sequence[Question], fit: Sequence[Question],
    known: Answers,
) -> Selection:  # fmt: skip
    """A verdict on everything that could be a pair."""
    if own.rejected == MODEL:
        answers = zip(fit, read_json(own.output / "answers.jsonl"), strict=True)
        made, unknown = [modelled(*answered, noise, known) for answered in answers], []
    else:
        found = [(question, other_image(question, truths(question, known), own.seed)) for question in fit]
        made = [candidate for _, candidate in found if candidate]
        unknown = [question for question, candidate in found if not candidate]
    if own.repoint:
        made += [moved for question in fit for moved in repointed(question, truths(question, known))]
    selection = select(questions, made, rules)
    for question in unknown:
        selection.drop(question, "no answer of another image", {})
    return selection


def finish(output: Path, arguments: dict[str, Any], rules: Rules, selection: Selection) -> None:
    """Write everything and say what came of it."""
    write(output, selection)
    counts, arguments = selection.counts(), {n: value for n, value in arguments.items() if n != "thresholds"}
    write_run_json(output / "run.json", arguments=arguments, thresholds=rules.thresholds, counts=counts)
    logger.info("%s", table(selection))
    logger.info("%s: %d pairs of %d candidates", output / "pairs.json", counts["kept"], counts["candidates"])
    if not selection.pairs:
        logger.info("no pair is left: see the reasons in %s", output / "dropped.jsonl")


if __name__ == "__main__":
    sys.exit(main())
