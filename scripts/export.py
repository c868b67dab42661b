"""Merge an adapter into a plain checkpoint: `python -m scripts.export --model_name_or_path ADAPTER --output DIR`.

Writes a llava-hf folder (safetensors, processor, chat template), which transformers reads without this repository, or
with `--format original` the layout of liuhaotian/llava-v1.5. The result is loaded again and compared with the source.
"""

import argparse
import logging
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftModel

from llava.checkpoints import image_tokens, load_model, load_processor
from llava.conversation import SYSTEM
from llava.original import write_checkpoint
from llava.runtime import ArgumentParser, setup_logging, stop, user_errors

logger = logging.getLogger("scripts.export")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLIP = "clip_vision_model"
PUBLISHED = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
# vicuna_v1 as in llava/conversation.py; the pictures of a turn come before its text, one a line.
CHAT_TEMPLATE = (
    SYSTEM + " {% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'user' %}USER: {% if content is string %}{{ content }}{% else %}"
    "{% for part in content %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in content %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %} "
    "{% elif message['role'] == 'assistant' %}ASSISTANT: "
    "{% if content is string %}{{ content }}{% else %}{{ content[0]['text'] }}{% endif %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def main() -> None:
    """Merge, write, read again, compare."""
    args = parse_args()
    setup_logging()
    with user_errors():
        if args.output.exists() and any(args.output.iterdir()):
            raise ValueError(f"{args.output}: the folder is not empty")
        processor = load_processor(args.model_name_or_path, args.image_tower)
        model = load_model(args.model_name_or_path, torch.float32, args.image_tower).eval()
    probe = example(model)
    before = logits(model, probe)
    merged = model.merge_and_unload() if isinstance(model, PeftModel) else model
    with user_errors():
        write(merged.to(DTYPES[args.dtype]), processor, args.output, args.format, args.model_name_or_path)
    again = load_model(str(args.output), torch.float32).eval()
    difference = (logits(again, probe) - before).abs().max().item()
    logger.info("wrote %s (%s, %s)", args.output, args.format, args.dtype)
    logger.info("largest difference of logits to the source: %.2e (logits up to %.1f)", difference, before.abs().max())
    if args.dtype == "float32" and difference > 1e-3:
        stop(f"{args.output}: the written checkpoint does not give the logits of {args.model_name_or_path}")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="adapter or checkpoint of any dialect")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, new or empty")
    parser.add_argument("--format", choices=["hf", "original"], default="hf", help="layout (default: hf)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="precision (default: bfloat16)")
    parser.add_argument("--image_tower", help="vision tower of an original checkpoint")
    return parser.parse_args()


def write(model, processor, folder: Path, layout: str, source: str) -> None:
    """The merged model in one of the two layouts."""
    if layout == "original":
        write_checkpoint(model, processor, folder, Path(source))
        return
    processor.chat_template = processor.chat_template or CHAT_TEMPLATE
    processor.save_pretrained(folder)
    model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tower = model.config.vision_config.model_type
    save_torch_state_dict({published_name(name, tower): t for name, t in model.state_dict().items()}, folder)


def published_name(name: str, tower: str = CLIP) -> str:
    """A tensor's name as llava-hf/llava-1.5-7b-hf has it, which every reader of that format knows.

    transformers 5 itself saves the vision tower under shorter names, and reads a tower other than CLIP by these only.
    """
    if tower != CLIP and name.startswith("model.vision_tower."):
        return name.removeprefix("model.")
    for ours, theirs in PUBLISHED:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise KeyError(name)


def example(model) -> dict[str, torch.Tensor]:
    """A seeded random prompt around two random pictures."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, config.image_token_id, (24,), generator=generator)
    image = torch.full((image_tokens(config),), config.image_token_id)
    side = config.vision_config.image_size
    ids = torch.cat([words[:8], image, words[8:12], image, words[12:]])[None]
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, side, side, generator=generator)}


@torch.no_grad()
def logits(model, probe: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits at the last twelve places, over the vocabulary that both layouts have."""
    out = model(**probe, logits_to_keep=12).logits
    return out[..., : model.config.image_token_id].float()


if __name__ == "__main__":
    main()
