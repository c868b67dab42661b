"""What a model answers to the instructions, with the perplexity of its own answer and its attention ratio.

Every answer is on disk as soon as it is there (llava.answers), so that rules may be changed without asking again.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from data_gen.gen_chosen_rejected.noise import Noise
from data_gen.gen_chosen_rejected.others import Answers, truths
from data_gen.gen_chosen_rejected.rules import Candidate
from llava.answering import Job, RecordsOf, identify, prepare, record, run
from llava.attention import layer_range
from llava.generation import PromptBatch, generate
from llava.records import Question, read_json

SELECTION_LAYER = (16, 16)  # of LLaVA-1.5-7B's 32: the layer that MIA-DPO selects by
# Flags that the answers are made with; all others may change without asking the model again.
ANSWERING = (
    "model_name_or_path", "only_base_model", "image_tower", "image_folder", "image_aspect_ratio", "batch_size", "dtype",
    "attention_layers", "attention_heads", "top_heads", "max_new_tokens", "degrade", "noise_std", "seed", "num_workers",
    "check_images",
)  # fmt: skip
GREEDY = {"temperature": 0.0, "top_p": 1.0, "num_beams": 1, "attention_maps": 0}


class Certainty(LogitsProcessor):
    """Notes the log of the largest probability of every step, at temperature 1."""

    def __init__(self):
        self._logs: list[Tensor] = []  # one (B,) a step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores as they are."""
        self._logs.append(scores.float().log_softmax(dim=-1).amax(dim=-1))
        return scores

    def perplexities(self, num_tokens: Sequence[int]) -> list[float]:
        """exp of minus the mean note over each answer's own tokens, its end token among them."""
        logs = torch.stack(self._logs, dim=1).double().cpu()
        return [math.exp(-row[:count].mean().item()) for row, count in zip(logs, num_tokens, strict=True)]


def ready(args: argparse.Namespace, questions: list[Question]) -> tuple[argparse.Namespace, Job]:
    """Everything checked before the weights are loaded. Raises DataError, ValueError, FileNotFoundError."""
    own = argparse.Namespace(**{name: getattr(args, name) for name in ANSWERING}, **GREEDY)
    job = prepare(own, questions)
    if not job.heads:
        job = replace(job, layers=sorted(layer_range(job.num_layers, args.attention_layers, SELECTION_LAYER)))
    noise = Noise(args.degrade, args.noise_std, args.seed)
    return own, replace(job, alter=None if args.degrade == "none" else noise)


def ask(args: argparse.Namespace, job: Job, output: Path) -> None:
    """Write the answers file, by all processes of the launcher, going on where a killed run was."""
    run(args, job, identify(args, job), output, _records_of(args, job))


def _records_of(args: argparse.Namespace, job: Job) -> RecordsOf:
    tokenizer = job.processor.tokenizer

    def records_of(model, numbers: Sequence[int], batch: PromptBatch) -> list[dict[str, Any]]:
        certainty = Certainty()
        found = generate(
            model, tokenizer, batch, job.layers, heads=job.chosen, max_new_tokens=args.max_new_tokens,
            logits_processor=[certainty],
        )  # fmt: skip
        perplexities = certainty.perplexities([len(given.tokens) for given in found])
        return [
            record(number, job, given) | {"perplexity": perplexity}
            for number, given, perplexity in zip(numbers, found, perplexities, strict=True)
        ]

    return records_of


def candidates(questions: Sequence[Question], output: Path, noise: Noise, known: Answers) -> list[Candidate]:
    """The answers of the file, one for each question, in order."""
    return [
        Candidate(
            question, given["text"], noise.name(question), given["is_complete"], given["attention_ratio"],
            given["perplexity"], tuple(truth.text for truth in truths(question, known)),
        )
        for question, given in zip(questions, read_json(output), strict=True)
    ]  # fmt: skip
