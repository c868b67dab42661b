"""Merge an adapter into a plain checkpoint: `python -m scripts.export --model_name_or_path ADAPTER --output DIR`.

Writes a llava-hf folder (safetensors, processor, chat template), which transformers reads without this repository, or
with `--format original` the layout of liuhaotian/llava-v1.5. The result is loaded again and compared with the source.
"""

import logging
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftModel
from PIL import Image

from llava.checkpoints import open_checkpoint
from llava.command_line import flag, parse
from llava.families import Family
from llava.families.llava15 import SYSTEM
from llava.families.llava15_original import write_checkpoint
from llava.run_folder import only_writer
from llava.runtime import setup_logging, stop, user_errors

logger = logging.getLogger("scripts.export")
_held = ExitStack()  # the lock of this run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLIP = "clip_vision_model"
PUBLISHED = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
# vicuna_v1 as in llava/families/llava15.py; the pictures of a turn come before its text, one a line.
CHAT_TEMPLATE = (
    SYSTEM + " {% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'user' %}USER: {% if content is string %}{{ content }}{% else %}"
    "{% for part in content %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in content %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %} "
    "{% elif message['role'] == 'assistant' %}ASSISTANT: "
    "{% if content is string %}{{ content }}{% else %}{{ content[0]['text'] }}{% endif %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(kw_only=True)
class ExportSettings:
    """What is merged, and how it is written."""

    model_name_or_path: str = flag("adapter or checkpoint of any dialect")
    output: Path = flag("folder to write, new or empty")
    format: str = flag("layout", "hf", choices=["hf", "original"])
    dtype: str = flag("precision", "bfloat16", choices=list(DTYPES))
    base_model: str | None = flag("what an adapter stands on, instead of the base it names", None)
    image_tower: str | None = flag("vision tower of an original checkpoint", None)

    def __post_init__(self):
        if self.output.exists() and not self.output.is_dir():
            raise NotADirectoryError(f"--output {self.output} is a file; give a folder")
        if self.output.exists() and any(self.output.iterdir()):
            raise ValueError(f"{self.output}: the folder is not empty")


def main() -> None:
    """Merge, write, read again, compare."""
    setup_logging()
    with user_errors():
        (own,) = parse((ExportSettings,), __doc__)
        _held.enter_context(only_writer(own.output))
        checkpoint = open_checkpoint(own.model_name_or_path, own.base_model, own.image_tower)
        family, model = checkpoint.family, checkpoint.load(torch.float32).eval()
    probe = example(family)
    before = logits(model, family, probe)
    merged = model.merge_and_unload() if isinstance(model, PeftModel) else model
    with user_errors():
        if own.format == "original":
            write_checkpoint(merged.to(DTYPES[own.dtype]), family.image_processor, own.output, checkpoint.chain)
        else:
            write(merged.to(DTYPES[own.dtype]), family, own.output)
    again = open_checkpoint(str(own.output)).load(torch.float32).eval()
    difference = (logits(again, family, probe) - before).abs().max().item()
    logger.info("wrote %s (%s, %s)", own.output, own.format, own.dtype)
    logger.info("largest difference of logits to the source: %.2e (logits up to %.1f)", difference, before.abs().max())
    if own.dtype == "float32" and difference > 1e-3:
        stop(f"{own.output}: the written checkpoint does not give the logits of {checkpoint}")


def write(model, family: Family, folder: Path) -> None:
    """The merged model as a llava-hf folder."""
    processor = family.processor()
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


def example(family: Family) -> dict[str, torch.Tensor]:
    """A seeded random prompt around two random pictures."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, family.image_id, (24,), generator=generator).tolist()
    pixels = family.pixels([Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64))])
    pixels = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in pixels.items()}
    ids = [*words[:8], family.image_id, *words[8:12], family.image_id, *words[12:]]
    return {"input_ids": torch.tensor([family.expand(ids, [family.image((64, 64))] * 2)]), **pixels}


@torch.no_grad()
def logits(model, family: Family, probe: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits at the last twelve places, over the vocabulary that both layouts have."""
    return model(**probe, logits_to_keep=12).logits[..., : family.image_id].float()


if __name__ == "__main__":
    sys.exit(main())
