"""What the tiny checkpoints share: a tokenizer with the real special tokens, a peaky model, a tower that sees light."""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

WORDS = [
    "Image1: Image2: Image3: In Image1, In Image2, what colour is the picture? Answer in one word.",
    "red green blue yellow white You are a helpful assistant. system user assistant\n User: Assistant:",
]


def template(name: str) -> str:
    """A chat template as it was published, of those that TRL brings."""
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def byte_tokenizer(specials: Sequence[str], chat_template: str | None, **roles: str | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as Qwen2's and LLaMA 3's but small. `roles`: eos_token, pad_token, bos_token ..."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(WORDS, trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=chat_template, clean_up_tokenization_spaces=False, **roles
    )


def peaky(config, sharpness: float = 3.0, seed: int = 0):
    """A random model of a config whose language model attends to few tokens, so that a wrong mask shows."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "self_attn.q_proj.weight" in name or "self_attn.k_proj.weight" in name:
                weight.mul_(sharpness)
    return model.eval()


def write(folder: Path, model, tokenizer, image_processor, processor: str, **settings) -> None:
    """The files of a checkpoint; weights under the names that the hub has.

    `processor`: name of transformers' class, as the hub has it in preprocessor_config.json; `settings` are those in its
    place, None for one that is left out.
    """
    model.save_pretrained(folder, save_original_format=True)
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    own = json.loads(file.read_text(encoding="utf-8")) | {"processor_class": processor} | settings
    file.write_text(json.dumps({name: value for name, value in own.items() if value is not None}), encoding="utf-8")


def mean_light(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Mean brightness 0..1 over all but the first axis of normalised pixels, whose second axis is the colour."""
    shape = (1, -1, *[1] * (pixels.dim() - 2))
    shown = pixels * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    return shown.flatten(1).mean(dim=1)
