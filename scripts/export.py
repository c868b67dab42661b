"""Merge an adapter into a plain checkpoint: `python -m scripts.export --model_name_or_path ADAPTER --output DIR`.

Writes the folder that the hub has for its family, which transformers reads without this repository, or with
`--format original` the layout of liuhaotian/llava-v1.5. The result is read again and compared with the source: the
tokens and pixels that plain transformers makes of prompts, and the first token of their answers.
"""

import json
import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import save_torch_state_dict
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

from llava.answering import encode_prompt, spread
from llava.checkpoints import Checkpoint, open_checkpoint
from llava.command_line import check_numbers, flag, parse
from llava.endpoint import messages_of
from llava.families import Family, Llava15, model_inputs
from llava.families.llava15_original import write_checkpoint
from llava.image import ImageStore
from llava.merging import in_float32, merge
from llava.records import Question, read_prompts
from llava.run_folder import only_writer, read_object
from llava.runtime import setup_logging, stop, user_errors
from llava.weights import first_line, share

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
SERVED_TEMPLATE = "chat_template_with_bos.jinja"  # for servers that add no start token to a template's text, as vLLM
GB = 1e9
SHARD_BYTES = 2 * 10**9  # of a written file, which is copied once while it is written
# Between resampling by pillow and by torchvision, on average: most pixels differ by one of 255 steps at most, some at
# sharp edges by twenty. Another padding, crop or order is far beyond it.
PIXELS_TOLERANCE = 0.02


@dataclass(kw_only=True)
class ExportSettings:
    """What is merged, and how it is written."""

    model_name_or_path: str = flag("adapter or checkpoint of any dialect")
    output: Path = flag("folder to write, new or empty")
    format: str = flag("layout", "hf", choices=["hf", "original"])
    dtype: str = flag("precision", "bfloat16", choices=list(DTYPES))
    base_model: str | None = flag("what an adapter stands on, instead of the base it names", None)
    image_tower: str | None = flag("vision tower of an original checkpoint", None)
    questions: Path | None = flag("prompts to compare on: a test set or pairs; default: the run's own data", None)
    image_folder: Path | None = flag("folder, .zip or .tar of their pictures", None)
    num: int = flag("prompts to compare on", 32)

    def __post_init__(self):
        check_numbers(self, num=(1, None))
        if (self.questions is None) != (self.image_folder is None):
            raise ValueError("--questions and --image_folder go together: prompts and their pictures")
        if self.output.exists() and not self.output.is_dir():
            raise NotADirectoryError(f"--output {self.output} is a file; give a folder")
        if self.output.exists() and any(self.output.iterdir()):
            raise ValueError(f"{self.output}: the folder is not empty")


@dataclass(frozen=True)
class Asked:
    """A prompt to compare on."""

    ids: list[int]  # one image token per picture
    turns: list[tuple[str, str]]  # (role, text)
    pictures: list[Image.Image]


def main() -> None:
    """Merge, write, read again, compare."""
    setup_logging()
    with user_errors():
        (own,) = parse((ExportSettings,), __doc__)
        _held.enter_context(only_writer(own.output))
        checkpoint = open_checkpoint(own.model_name_or_path, own.base_model, own.image_tower)
        asked = prompts(own, checkpoint)
        export(checkpoint, own.output, own.dtype, own.format, asked)


def export(checkpoint: Checkpoint, output: Path, dtype: str, layout: str, asked: Sequence[Asked]) -> None:
    """Write a checkpoint merged as a folder, and compare the two. Ends the process where they are not the same."""
    family = checkpoint.family
    stored = max(checkpoint.stored, key=lambda kind: (kind.is_floating_point, kind.itemsize))
    loaded = torch.float32 if dtype == "float32" else stored
    logger.info(describe_memory(checkpoint, loaded))
    if layout == "original" and not isinstance(family, Llava15):
        raise ValueError(f"--format original: {family.name} has no such layout; take --format hf")
    model = checkpoint.load(loaded, exact_adapter=True).eval()
    before = first_logits(model, family, asked)
    model, rounding = merge(model, DTYPES[dtype])
    if layout == "original":
        write_checkpoint(model, family, output, checkpoint.chain)
    else:
        write(model, family, output)
        compare_inputs(family, output, asked)
    share(output)
    del model  # before the result is read: one model at a time
    after = first_logits(open_checkpoint(str(output)).load(DTYPES[dtype], exact_adapter=True).eval(), family, asked)
    logger.info("wrote %s (%s, %s)", output, layout, dtype)
    difference = (after - before).abs().max().item()
    logger.info("largest difference of logits to the source: %.2e (logits up to %.1f)", difference, before.abs().max())
    if dtype == "float32" and difference > 1e-3:
        stop(f"{output}: the written checkpoint does not give the logits of {checkpoint}")
    if rounding.lost and dtype != "float32":
        logger.info(
            "rounding to %s ate the adapter in %.1f %% of the %s numbers that it changes: there the base's own stay",
            dtype, 100 * rounding.share, f"{rounding.changed:,}",
        )  # fmt: skip
    logger.info(verdict(before, after, dtype))


def verdict(before: torch.Tensor, after: torch.Tensor, dtype: str) -> str:
    """What the first tokens (N, V logits) say of an export, in a line."""
    changed = int((before.argmax(dim=-1) != after.argmax(dim=-1)).sum())
    largest = (before.softmax(dim=-1) - after.softmax(dim=-1)).abs().max().item()
    share = 100 * changed / len(before)
    found = f"first tokens that change: {changed} of {len(before)} ({share:.1f} %), probabilities by {largest:.1e}: "
    if not changed:
        return found + "it answers as its source"
    return found + f"{dtype} costs answers; --dtype float32 keeps them"


def describe_memory(checkpoint: Checkpoint, dtype: torch.dtype) -> str:
    """What the merge will need, from the headers of the weights' files."""
    numbers = checkpoint.stored.total()
    weights = numbers * dtype.itemsize
    file, precision = min(weights, SHARD_BYTES), str(dtype).removeprefix("torch.")
    free = psutil.virtual_memory().available
    return (
        f"memory: {(weights + file) / GB:.3g} GB are needed ({numbers:,} numbers in {precision}, {file / GB:.2g} GB "
        f"for a file in the making), {free / GB:.3g} GB are free"
    )


# ---- what is compared on


def prompts(own: ExportSettings, checkpoint: Checkpoint) -> list[Asked]:
    """Prompts of the flags, else of the data that the run in the folder names, else around drawn pictures.

    Raises DataError, ValueError, FileNotFoundError for what the flags name.
    """
    family = checkpoint.family
    if own.questions is not None:
        return read_asked(family, own.questions, own.image_folder, own.num)
    data = run_data(Path(own.model_name_or_path))
    try:
        if data:
            return read_asked(family, *data, own.num)
        reason = "no --questions given, and the folder names no data that is here"
    except (OSError, ValueError) as error:  # the data has changed since: no reason not to export
        reason = f"the run's own cannot be read ({first_line(error)}), and no --questions given"
    logger.info("compared on drawn pictures: %s", reason)
    return drawn(family)[: own.num]


def read_asked(family: Family, path: Path, image_folder: Path, num: int) -> list[Asked]:
    """`num` prompts of a file, in turn from every format. Raises DataError, ValueError, FileNotFoundError."""
    questions, store = read_prompts(path), ImageStore(image_folder)
    asked = [
        asked_of(family, questions[number], [store.open(name) for name in questions[number].images])
        for number in sorted(spread(questions, num))
    ]
    logger.info("compared on %d prompts of %s", len(asked), path)
    return asked


def run_data(folder: Path) -> tuple[Path, Path] | None:
    """(pairs, pictures) that the run of a folder, or of its parent, was trained on, if they are still there."""
    for place in (folder, folder.resolve().parent):
        if (place / "run.json").is_file():
            data = read_object(place / "run.json").get("data") or {}
            found = Path(str(data.get("data_path"))), Path(str(data.get("image_folder")))
            return found if all(path.exists() for path in found) else None
    return None


def drawn(family: Family) -> list[Asked]:
    """Questions about pictures of colours that run into each other, wide, high and square."""
    across, around = Image.linear_gradient("L"), Image.radial_gradient("L")
    bands = [across, around, across.rotate(90), around.rotate(45), across.rotate(180), across.rotate(270)]
    sizes = [(144, 72), (60, 200), (336, 336), (500, 333), (90, 97), (31, 17)]
    pictures = [
        Image.merge("RGB", (bands[n], bands[(n + 1) % 6], bands[(n + 2) % 6])).resize(size)
        for n, size in enumerate(sizes)
    ]
    found = []
    for number, pair in enumerate(pairwise([*pictures, pictures[0]])):
        prompt = f"Image1:<image>\nImage2:<image>\nIn Image{1 + number % 2}, what is shown?"
        found.append(Asked(family.encode_prompt(prompt), [("user", prompt)], [*pair]))
    return found


def asked_of(family: Family, question: Question, pictures: list[Image.Image]) -> Asked:
    """A question and its pictures, ready to be compared on. Raises ValueError naming the record."""
    return Asked(encode_prompt(family, question), turns_of(question), pictures)


def turns_of(question: Question) -> list[tuple[str, str]]:
    """(role, text) of what is said, up to where the answer begins."""
    return [*question.context, ("user", question.prompt)]


def compare_inputs(family: Family, folder: Path, asked: Sequence[Asked]) -> None:
    """Ends the process where plain transformers makes other tokens or pixels of a prompt than it was trained on.

    Its processors resample by torchvision, training by pillow. So pixels must be the same where it is told to use
    pillow, too, and close where it is not.
    """
    try:
        processor, same = plain_processor(folder), plain_processor(folder, by_pillow=True)
    except (ImportError, ValueError) as error:
        if "torchvision" not in str(error).lower():
            raise
        # Its processors of some families want it for videos.
        logger.warning("not compared with the inputs that plain transformers makes: %s", first_line(error))
        return
    largest, mean = 0.0, 0.0
    for one in asked:
        pixels = family.plain_pixels(family.pixels(one.pictures))
        for own, tolerance in ((same, 1e-5), (processor, PIXELS_TOLERANCE)):
            inputs = plain_inputs(own, one.turns, one.pictures)
            if inputs["input_ids"][0].tolist() != tokens_of(family, one)[0]:
                stop(f"{folder}: plain transformers makes other tokens of {one.turns[-1][1][:80]!r}")
            for name, tensor in pixels.items():
                found = inputs[name]
                if found.numel() != tensor.numel():  # a family may have them in other axes
                    stop(f"{folder}: plain transformers makes {name} of {[*found.shape]}, not {[*tensor.shape]}")
                difference = (found.float().flatten() - tensor.float().flatten()).abs()
                if difference.mean() > tolerance:
                    stop(f"{folder}: plain transformers makes other pictures, by {difference.mean():.1e} on average")
                largest, mean = max(largest, difference.max().item()), max(mean, difference.mean().item())
    logger.info(
        "plain transformers makes the same tokens of %d prompts, the same pixels if it resamples by pillow, and by "
        "itself pixels within %.0e (%.0e on average)", len(asked), largest, mean,
    )  # fmt: skip


def plain_processor(folder: Path | str, by_pillow: bool = False) -> Any:
    """The processor of a folder as plain transformers has it; `by_pillow`: pictures are resampled as in training."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    if by_pillow:
        processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    return processor


def plain_inputs(processor, turns: Sequence[tuple[str, str]], pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """What plain transformers makes of a conversation."""
    messages = messages_of(turns, pictures, lambda picture: {"type": "image", "image": picture})
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def tokens_of(family: Family, asked: Asked, answer: Sequence[int] = ()) -> tuple[list[int], torch.Tensor]:
    """(ids, positions (axes, S)) of a prompt as training fed it, and of the beginning of an answer."""
    images = family.images([picture.size for picture in asked.pictures])
    ids = [*family.expand(asked.ids, images), *answer]
    return ids, family.positions(ids, images)


@torch.no_grad()
def next_logits(model, family: Family, asked: Asked, answer: Sequence[int] = ()) -> torch.Tensor:
    """(V,) logits of the token that follows a prompt, or the beginning of an answer to it."""
    ids, positions = (torch.as_tensor(found, device=model.device) for found in tokens_of(family, asked, answer))
    pixels = {name: tensor.to(model.device) for name, tensor in family.pixels(asked.pictures).items()}
    inputs = model_inputs(family.encode(model, pixels), positions[:, None])
    return model(input_ids=ids[None], **inputs, logits_to_keep=1).logits[0, -1]


def first_logits(model, family: Family, asked: Sequence[Asked]) -> torch.Tensor:
    """(N, V) logits of the first token of every answer, over the vocabulary that both layouts have; in float32."""
    with in_float32(model):
        found = [next_logits(model, family, one)[: family.image_id] for one in asked]
    return torch.stack(found).float()


# ---- what is written


def write(model, family: Family, folder: Path) -> None:
    """The merged model as the hub has its family."""
    family.save(folder)
    stop_at(model.generation_config, family.end_id)
    if not isinstance(family, Llava15):
        model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
        return
    processor = family.processor()
    # Where transformers 4, and servers on it, look for the pictures' settings.
    pictures = processor.image_processor.to_dict() | {"processor_class": type(processor).__name__}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures, indent=2) + "\n", encoding="utf-8")
    (folder / SERVED_TEMPLATE).write_text("{{ bos_token }}" + processor.chat_template, encoding="utf-8")
    model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tower = model.config.vision_config.model_type
    tensors = {published_name(name, tower): tensor for name, tensor in model.state_dict().items()}
    save_torch_state_dict(tensors, folder, max_shard_size=SHARD_BYTES)


def stop_at(generation, token: int) -> None:
    """Let answers elsewhere end where they end here: a tokenizer's or model's own end token may be another."""
    known = generation.eos_token_id
    known = known if isinstance(known, list) else [] if known is None else [known]
    if token not in known:
        generation.eos_token_id = [token, *known]


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


if __name__ == "__main__":
    sys.exit(main())
