"""Held-out accuracy of a miniature model on one-question prompts, by format, and what its errors are."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from llava.families.llava15 import vicuna_v1
from scripts.miniature.lessons import encode
from scripts.miniature.prompts import SEQUENCE_LENGTHS, Prompt, sample_prompt
from scripts.miniature.world import ATTRIBUTES

BATCH = 50
SETS = [("single", None), *(("sequence", n) for n in SEQUENCE_LENGTHS), ("collage", None), ("pip", None)]


def score_base(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    num_test: int,
    split: str = "test",
    seed: int = 0,
) -> dict:
    """Scores of every format; `split` names what is held out."""
    scores = {}
    for number, (image_type, num_scenes) in enumerate(SETS):
        rng = np.random.default_rng([seed, number])
        prompts = [sample_prompt(rng, split, image_type, num_scenes) for _ in range(num_test)]
        name = f"{image_type}_{num_scenes}" if num_scenes else image_type
        scores[name] = summarize(prompts, answer(model, processor, prompts))
    return scores


def validation_accuracy(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    image_type: str,
    num_scenes: int | None,
    count: int,
) -> float:
    """Of `count` validation prompts of a format, in %; always the same ones."""
    prompts = [sample_prompt(np.random.default_rng(n), "validation", image_type, num_scenes) for n in range(count)]
    return summarize(prompts, answer(model, processor, prompts))["accuracy"]


def answer(model: LlavaForConditionalGeneration, processor: LlavaProcessor, prompts: list[Prompt]) -> list[str]:
    """Greedy one-word answers; an answer that would go on after its first token counts as none.

    The end token is asked for behind the true answer, which is the same for every answer that is right.
    """
    words = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        texts = [vicuna_v1([(prompt.text, prompt.answer)]) for prompt in part]
        batch = encode(processor, texts, [picture for prompt in part for picture in prompt.pictures()])
        inputs = {"input_ids": batch.input_ids, "pixel_values": batch.pixel_values}
        with torch.inference_mode():
            logits = model(**inputs, logits_to_keep=batch.before).logits
        first, second = logits.flatten(0, -2).argmax(-1).view(-1, 2).unbind(-1)
        ended = second == processor.tokenizer.eos_token_id
        decoded = [processor.tokenizer.decode([token]).strip() for token in first.tolist()]
        words += [word if end else "" for word, end in zip(decoded, ended.tolist(), strict=True)]
    return words


def summarize(prompts: list[Prompt], words: list[str]) -> dict:
    """Accuracy, by attribute and by target position, and the share of errors true of another image."""
    right = np.array([prompt.answer == word for prompt, word in zip(prompts, words, strict=True)])
    wrong = [(prompt, word) for prompt, word in zip(prompts, words, strict=True) if prompt.answer != word]
    confused = [word in prompt.others for prompt, word in wrong]
    attributes = np.array([prompt.attribute for prompt in prompts])
    targets = np.array([prompt.target + 1 for prompt in prompts])
    return {
        "accuracy": _percent(right),
        "num_prompts": len(prompts),
        "confusion_share": _percent(confused),
        "by_attribute": {name: _percent(right[attributes == name]) for name in ATTRIBUTES},
        "by_target": {int(target): _percent(right[targets == target]) for target in np.unique(targets)},
    }


def _percent(hits: Sequence[bool]) -> float | None:
    return round(100 * float(np.mean(hits)), 1) if len(hits) else None
