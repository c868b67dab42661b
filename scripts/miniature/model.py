"""A tiny LLaVA-1.5 for the miniature world: plain architecture, LLaMA-style tokenizer, everything from nothing."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from llava.families.llava15 import SYSTEM, Llava15
from scripts.miniature.draw import SIDE
from scripts.miniature.prompts import CENTRE_PHRASES, QUESTIONS
from scripts.miniature.world import ATTRIBUTES

PATCH_SIDE = 12
TEXT_WIDTH, VISION_WIDTH = 128, 96
MAX_POSITIONS = 2048
PROJECTOR_SCALE = 0.1  # of its last layer: image tokens start at the scale of word embeddings, or routing is slow
FEATURES_WIDTH = VISION_WIDTH  # of what `features` gives


def build(seed: int) -> tuple[LlavaForConditionalGeneration, Llava15]:
    """An untrained model and its family."""
    processor = build_processor()
    model = build_model(processor, seed)
    return model, Llava15(model.config, processor.tokenizer, processor.image_processor)


def features(model: LlavaForConditionalGeneration, pixels: Mapping[str, Tensor]) -> Tensor:
    """(pictures, patches, FEATURES_WIDTH) what the tower hands to the projector."""
    states = model.model.vision_tower(**pixels, output_hidden_states=True).hidden_states
    return states[model.config.vision_feature_layer][:, 1:]


def save(family: Llava15, folder: Path) -> None:
    """Write tokenizer and pictures' settings."""
    build_processor().save_pretrained(folder)


def build_processor(side: int = SIDE, patch: int = PATCH_SIDE) -> LlavaProcessor:
    """Tokenizer and image processor, as those of llava-1.5-7b-hf but for the sizes and the vocabulary."""
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return LlavaProcessor(
        image_processor=image_processor, tokenizer=build_tokenizer(), patch_size=patch, num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )  # fmt: skip


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-fallback BPE with LLaMA's rules and a word a token for the world's own text; any text encodes."""
    specials = ["<unk>", "<s>", "</s>"]
    pieces, merges = _learn_merges(world_text())
    words = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = _llama_normalizer()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in [*specials, "<image>"]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>",
        padding_side="right", model_max_length=MAX_POSITIONS, clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def world_text(frame: Sequence[str] = (SYSTEM, "USER: ASSISTANT:")) -> list[str]:
    """Every word that the world's conversations contain, first those of the frame that a family puts around them."""
    questions = [
        variant
        for question in QUESTIONS.values()
        for variant in (question, f"\n{question}", question[0].lower() + question[1:])
    ]
    answers = [word for values in ATTRIBUTES.values() for word in values]
    return [*frame, "In Image1,", "\nIn", "\nImage1:", *CENTRE_PHRASES, *questions, *answers]


def build_model(processor: LlavaProcessor, seed: int) -> LlavaForConditionalGeneration:
    """An untrained LLaVA-1.5 of about 1.5 M parameters."""
    config = build_config(processor, (TEXT_WIDTH, 4, 4, 384), (VISION_WIDTH, 4, 6))
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    spread(model.model.language_model)
    model.model.multi_modal_projector.linear_2.weight.data.mul_(PROJECTOR_SCALE)
    model.generation_config = GenerationConfig(do_sample=False, **_special_ids(processor))
    return model


@torch.no_grad()
def spread(module: nn.Module) -> None:
    """Draw the weights of every layer so that what goes through keeps its scale: from 0.02 routing does not form."""
    for name, weight in module.named_parameters():
        if weight.ndim == 2 and "embed" not in name:
            weight.normal_(std=weight.shape[1] ** -0.5)


def build_config(
    processor: LlavaProcessor, text: tuple[int, int, int, int], vision: tuple[int, int, int]
) -> LlavaConfig:
    """A LLaVA-1.5's config: hidden size, layers and heads of both parts, of the text also the feed-forward size."""
    side, special_ids = processor.image_processor.size["shortest_edge"], _special_ids(processor)
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            **dict(zip(sizes, (*vision, 4 * vision[0]), strict=True)), image_size=side,
            patch_size=processor.patch_size, projection_dim=vision[0],
        ),
        text_config=LlamaConfig(
            **dict(zip(sizes, text, strict=True)), vocab_size=len(processor.tokenizer), tie_word_embeddings=False,
            max_position_embeddings=MAX_POSITIONS, **special_ids,
        ),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(side // processor.patch_size) ** 2,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        **special_ids,
    )  # fmt: skip


def _special_ids(processor: LlavaProcessor) -> dict[str, int]:
    return {f"{name}_token_id": getattr(processor.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def _llama_normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def _learn_merges(text: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces and merges of a BPE over `text`; a digit or a sign is never merged with its neighbours."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = _llama_normalizer()
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?[A-Za-z]+|[^A-Za-z]"), "isolated")
    printable = [chr(code) for code in range(33, 127)]
    learner.train_from_iterator(text, trainers.BpeTrainer(initial_alphabet=["▁", *printable], show_progress=False))
    model = json.loads(learner.to_str())["model"]
    pieces = [piece for piece, _ in sorted(model["vocab"].items(), key=lambda item: item[1]) if piece != "\n"]
    return pieces, [tuple(merge) for merge in model["merges"]]
