"""A LLaVA of real parts: a LLaMA language model and a DINOv2 tower, both pretrained, and a fresh projector between.

Plain as LLaVA-1.5: its processor, its vicuna_v1 template with `<image>` and `</s>`, its two-layer projector, and the
tower's last but one layer without the class token.
"""

import torch
from llava.conversation import END, IMAGE
from llava.original import pad_rows
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPImageProcessorPil,
    Dinov2Model,
    GenerationConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # what DINOv2 was trained with
PADDED_TO = 64  # rows of the vocabulary are a multiple of it
PROJECTOR_SCALE = 0.1  # of its last layer: image tokens start at the scale of word embeddings


def build_processor(tokenizer: PreTrainedTokenizerFast, side: int, patch: int, max_length: int) -> LlavaProcessor:
    """The language model's tokenizer with LLaVA's two tokens, and an image processor for pictures of `side` px."""
    size = {"height": side, "width": side}
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size=size, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=with_llava_tokens(tokenizer, max_length),
        patch_size=patch,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )


def with_llava_tokens(tokenizer: PreTrainedTokenizerFast, max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer with `</s>` and `<image>` added, and every text begun by its own first token, as LLaMA's is.

    The beginning token is what the language model always had at position 0 in its training, and rests attention on.
    """
    backend, bos = tokenizer.backend_tokenizer, tokenizer.bos_token
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in (END, IMAGE)])
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=END,
        unk_token=tokenizer.unk_token,
        pad_token=tokenizer.unk_token,
        padding_side="right",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": IMAGE},
    )


def assemble(
    language_model: LlamaForCausalLM, tower: Dinov2Model, processor: LlavaProcessor, old_end: int, seed: int
) -> LlavaForConditionalGeneration:
    """Both parts in one LLaVA, every tensor copied; `</s>` starts as the token `old_end`, which ended texts before."""
    tokenizer = processor.tokenizer
    special_ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    rows = -(-len(tokenizer) // PADDED_TO) * PADDED_TO
    text = language_model.config.to_dict() | special_ids | {"vocab_size": rows}
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=language_model.config.tie_word_embeddings,
        **special_ids,
    )
    torch.manual_seed(seed)  # of the projector
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(_with_rows(language_model.model.state_dict(), "embed_tokens", rows))
    model.lm_head.load_state_dict(_with_rows(language_model.lm_head.state_dict(), "weight", rows))
    with torch.no_grad():
        for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
            weight[tokenizer.eos_token_id] = weight[old_end]
        model.model.multi_modal_projector.linear_2.weight.mul_(PROJECTOR_SCALE)
    model.generation_config = GenerationConfig(do_sample=False, **special_ids)
    return model


def _with_rows(state: dict[str, torch.Tensor], part: str, rows: int) -> dict[str, torch.Tensor]:
    return {name: pad_rows(tensor, rows) if part in name else tensor for name, tensor in state.items()}
