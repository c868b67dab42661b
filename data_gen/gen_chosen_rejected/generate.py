"""What a model answers to the instructions, with the perplexity of its own answer and its attention ratio.

Every answer is on disk as soon as it is there (llava.answers), so that rules may be changed without asking again.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from data_gen.gen_chosen_rejected.noise import Noise
from data_gen.gen_chosen_rejected.others import Answers, truths
from data_gen.gen_chosen_rejected.rules import Candidate
from llava.answering import Job, answer, identify, prepare
from llava.attention import layer_range
from llava.records import Question, read_json
from llava.settings import AnswerSettings, ModelSettings

SELECTION_LAYER = (16, 16)  # of LLaVA-1.5-7B's 32: the layer that MIA-DPO selects by


def ready(model: ModelSettings, settings: AnswerSettings, noise: Noise, questions: list[Question]) -> Job:
    """Everything checked before the weights are loaded. Raises DataError, ValueError, FileNotFoundError."""
    job = prepare(model, settings, questions)
    if not job.heads:
        layers = layer_range(job.checkpoint.num_layers, settings.attention_layers, SELECTION_LAYER)
        job = replace(job, layers=sorted(layers))
    return replace(job, alter=None if noise.kind == "none" else noise)


def ask(job: Job, noise: Noise, output: Path) -> None:
    """Write the answers file, by all processes of the launcher, going on where a killed run was."""
    answer(job, output, identify(job) | {"noise": asdict(noise)})


def candidates(questions: Sequence[Question], output: Path, noise: Noise, known: Answers) -> list[Candidate]:
    """The answers of the file, one for each question, in order."""
    return [
        Candidate(
            question, given["text"], noise.name(question), given["is_complete"], given["attention_ratio"],
            given["perplexity"], tuple(truth.text for truth in truths(question, known)),
        )
        for question, given in zip(questions, read_json(output), strict=True)
    ]  # fmt: skip
