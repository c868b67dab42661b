"""Held-out accuracy of a miniature model on one-question prompts, by format."""

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from llava.families.llava15 import vicuna_v1
from scripts.miniature.lessons import encode
from scripts.miniature.prompts import SEQUENCE_LENGTHS, Prompt, sample_prompt

BATCH = 50
SETS = [("single", None), *(("sequence", n) for n in SEQUENCE_LENGTHS), ("collage", None), ("pip", None)]


def score_base(model: LlavaForConditionalGeneration, processor: LlavaProcessor, num_test: int) -> dict:
    """Accuracy in % on `num_test` test prompts of every format."""
    scores = {}
    for number, (image_type, num_scenes) in enumerate(SETS):
        rng = np.random.default_rng([0, number])
        prompts = [sample_prompt(rng, "test", image_type, num_scenes) for _ in range(num_test)]
        name = f"{image_type}_{num_scenes}" if num_scenes else image_type
        scores[name] = {"accuracy": accuracy(model, processor, prompts), "num_prompts": num_test}
    return scores


def validation_accuracy(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, image_type: str, num_scenes: int | None, count: int
) -> float:
    """Of `count` validation prompts of a format, in %; always the same ones."""
    prompts = [sample_prompt(np.random.default_rng(n), "validation", image_type, num_scenes) for n in range(count)]
    return accuracy(model, processor, prompts)


def accuracy(model: LlavaForConditionalGeneration, processor: LlavaProcessor, prompts: list[Prompt]) -> float:
    """Share of right answers in %."""
    words = answer(model, processor, prompts)
    right = [prompt.answer == word for prompt, word in zip(prompts, words, strict=True)]
    return round(100 * float(np.mean(right)), 1)


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
