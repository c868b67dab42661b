"""The flags of every command that answers questions, as dataclasses."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava.checkpoints import Checkpoint, open_checkpoint
from llava.checks import DEPTHS
from llava.command_line import check_choices, check_numbers, flag
from llava.heads import HeadSettings
from llava.order import in_other_orders
from llava.records import Question, read_questions


@dataclass(kw_only=True)
class QuestionFiles:
    """What is asked, and where the answers go."""

    _argument_group_name = "files"

    data_path: str = flag("test set: JSON array or JSONL")
    output: Path = flag("answers file to write (answers.jsonl)")
    permutations: int = flag("orders of its pictures in which a sequence is asked, the given one first", 1)

    def __post_init__(self):
        check_numbers(self, permutations=(1, 1000))

    def read(self) -> list[Question]:
        """The questions, those in other orders last. Raises DataError, FileNotFoundError, ValueError."""
        questions = read_questions(self.data_path)
        return questions + in_other_orders(questions, self.permutations)


@dataclass(kw_only=True)
class ModelSettings:
    """Which model reads which pictures, and how."""

    _argument_group_name = "model and pictures"

    model_name_or_path: str = flag("checkpoint or adapter of any dialect: folder or hub name")
    base_model: str | None = flag("what an adapter stands on, instead of the base it names", None)
    only_base_model: bool = flag("answer with the base below the adapter", False)
    merge_adapter: str = flag(
        "True: answer with an adapter added to the weights below it, rounded once to --dtype: 900 kernels a token "
        "fewer at 7B, but bfloat16 loses what is small beside a weight; False: compute it apart; auto: True on a "
        "GPU, False on a CPU", "auto", choices=["auto", "True", "False"],
    )  # fmt: skip
    image_tower: str | None = flag("vision tower of an original checkpoint", None)
    image_folder: str = flag("folder, .zip or .tar of the pictures")
    image_aspect_ratio: str = flag(
        "as in training; auto: what the checkpoint says, else pad", "auto", choices=["auto", "pad", "crop"]
    )
    max_image_tokens: int | None = flag("tokens that a picture may cost, in families where its size decides", None)
    batch_size: int = flag("prompts per batch", 8)
    num_workers: int = flag("processes that read pictures ahead", 2)
    check_images: str = flag(
        "before loading weights: decode every picture, read its header, or only see that it is there", "full",
        choices=DEPTHS,
    )  # fmt: skip
    dtype: str = flag(
        "auto: bfloat16 on a GPU, float32 on a CPU", "auto", choices=["auto", "float32", "bfloat16", "float16"]
    )

    def __post_init__(self):
        check_choices(self)
        check_numbers(self, batch_size=(1, None), num_workers=(0, 512), max_image_tokens=(1, None))

    def open(self) -> Checkpoint:
        """The checkpoint to answer with. Raises like `open_checkpoint`."""
        pad = None if self.image_aspect_ratio == "auto" else self.image_aspect_ratio == "pad"
        checkpoint = open_checkpoint(
            self.model_name_or_path, self.base_model, self.image_tower, pad, self.max_image_tokens
        )
        return checkpoint.root if self.only_base_model else checkpoint

    def merges(self, checkpoint: Checkpoint) -> bool:
        """Whether the adapter of a checkpoint, if it is one, is added to the weights below it."""
        wanted = torch.cuda.is_available() if self.merge_adapter == "auto" else self.merge_adapter == "True"
        return wanted and checkpoint.base is not None

    @property
    def torch_dtype(self) -> torch.dtype:
        """The precision asked for."""
        if self.dtype == "auto":
            return torch.bfloat16 if torch.cuda.is_available() else torch.float32
        return getattr(torch, self.dtype)


@dataclass(kw_only=True)
class AnswerSettings(HeadSettings):
    """How questions are answered, and what is measured meanwhile."""

    _argument_group_name = "answers"

    attention_layers: str = flag("layers of the attention ratio: auto, 14-22, 3,5 or none", "auto")
    attention_maps: int = flag("questions whose answer keeps its map of attention by patch", 12)
    max_new_tokens: int = flag("tokens of an answer at most", 128)
    temperature: float = flag("0 is greedy", 0.0)
    top_p: float = flag("nucleus of sampling", 1.0)
    num_beams: int = flag("beams", 1)
    seed: int = flag("of sampling; every batch has its own stream", 0)

    def __post_init__(self):
        check_numbers(self, max_new_tokens=(1, None), num_beams=(1, None), temperature=(0, None), top_p=(0, 1))
        check_numbers(self, top_heads=(1, None), attention_maps=(0, None), seed=(0, 2**32 - 1))
        if self.top_p == 0:
            raise ValueError("--top_p must be above 0")
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError("--num_beams and --temperature together are not supported: choose one")

    @property
    def generation(self) -> dict[str, Any]:
        """As transformers' `generate` takes them."""
        settings: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}
        if self.temperature > 0:
            settings |= {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return settings
