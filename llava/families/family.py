"""What is true of one model family and not of another: its prompts, its image tokens, the names of its modules.

A family is one file beside this one. Everything else (attention, scaling, losses, packing, answering) is neutral and
asks the family.

Letters: P image tokens of one picture, S tokens of a prompt.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from llava.records import IMAGE

Context = Sequence[tuple[str, str]]  # (role, text) before a prompt, as of `records.Prompt`


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """The tokens of one picture in a prompt, and which of its pixels each image token stands for."""

    ids: tuple[int, ...]  # as they stand in the prompt: image tokens, and the family's text between them if it has any
    areas: Float[Tensor, "P 4"]  # x0, y0, x1, y1 of each image token, in px of the stored picture; may reach outside it
    shape: tuple[int, int]  # rows and columns of the raster that heat maps are drawn on
    size: tuple[int, int]  # width and height of the stored picture in px

    def weights(self, box: Sequence[float]) -> Float[Tensor, " P"]:
        """Share (0..1) of each token's area that lies in `box` (x0, y0, x1, y1), in px of the stored picture.

        A border that cuts an area gives it a fractional weight.
        """
        x0, y0, x1, y1 = box
        return _overlap(self.areas[:, 1::2], y0, y1) * _overlap(self.areas[:, 0::2], x0, x1)

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """The box (x0, y0, x1, y1) that all areas lie in, in px of the stored picture."""
        return (*self.areas[:, :2].amin(dim=0).tolist(), *self.areas[:, 2:].amax(dim=0).tolist())

    def raster(self, mass: Float[Tensor, " P"]) -> Float[Tensor, "rows cols"]:
        """The mass of the tokens shared out over a raster of `shape` on `extent`, by area; it keeps its sum."""
        x0, y0, x1, y1 = self.extent
        rows, cols = self.shape
        down = _shares(self.areas[:, 1::2], torch.linspace(y0, y1, rows + 1, dtype=torch.float64))
        across = _shares(self.areas[:, 0::2], torch.linspace(x0, x1, cols + 1, dtype=torch.float64))
        return torch.einsum("p,pr,pc->rc", mass.double(), down, across).to(mass)


def _overlap(spans: Float[Tensor, "P 2"], start: float, end: float) -> Float[Tensor, " P"]:
    """Share of each span (from, to) that lies in start..end."""
    covered = spans[:, 1].clamp(max=end) - spans[:, 0].clamp(min=start)
    return (covered / (spans[:, 1] - spans[:, 0])).clamp(min=0).float()


def _shares(spans: Float[Tensor, "P 2"], edges: Float[Tensor, " N1"]) -> Float[Tensor, "P N"]:
    """Share of each span that lies between every two neighbouring edges."""
    covered = torch.minimum(spans[:, 1:], edges[1:]) - torch.maximum(spans[:, :1], edges[:-1])
    return covered.clamp(min=0) / (spans[:, 1:] - spans[:, :1])


class Family(ABC):
    """A family bound to one checkpoint's config, tokenizer and image processor.

    `pad`: pictures are padded to a square first (`--image_aspect_ratio pad`), where the family knows such a thing.
    Raises ValueError if the three are not of one model, saying what does not fit.
    """

    name: str
    model_type: str  # of config.json
    model_class: Any  # transformers' class
    language = "language_model"  # parts of parameter names ...
    tower = "vision_tower"
    projector = "multi_modal_projector"
    end: str  # text of the token that ends an answer
    fixed: bool  # a picture has as many tokens whatever its size

    def __init__(self, config, tokenizer, image_processor, pad: bool = True):
        self.config, self.tokenizer, self.image_processor, self.pad = config, tokenizer, image_processor, pad
        self._specials = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        found = tokenizer.convert_tokens_to_ids(IMAGE)
        if found != self.image_id:
            raise ValueError(f"the tokenizer reads {IMAGE} as id {found}, the model has id {self.image_id}")
        if tokenizer.eos_token != self.end:
            raise ValueError(f"the end token is {tokenizer.eos_token!r}, {self.name} ends answers with {self.end!r}")

    @classmethod
    @abstractmethod
    def check_config(cls, config) -> None:
        """Raises ValueError for a config that this code would read wrongly."""

    @abstractmethod
    def processor(self) -> Any:
        """Tokenizer, pictures' settings and chat template as transformers saves and loads them together."""

    @abstractmethod
    def check_processor(self, settings: Mapping[str, Any]) -> str | None:
        """What plain transformers would do wrong with a folder's processor_config.json; None: nothing."""

    @property
    def image_id(self) -> int:
        """Id of an image token."""
        return self.config.image_token_id

    @classmethod
    @abstractmethod
    def bare_name(cls, name: str) -> str:
        """A tensor's name as the model has it, whatever PEFT, wrappers or an older transformers made of it."""

    @classmethod
    @abstractmethod
    def renewed(cls, names: Any) -> Any:
        """What names modules in an adapter's config (a pattern, a list, or a table) with today's names in it."""

    @classmethod
    def is_older_name(cls, name: str) -> bool:
        """Whether today's transformers has another name for an adapter's tensor than the one it is saved under."""
        return cls.bare_name(name) not in name

    @classmethod
    def lora_targets(cls) -> str:
        """Pattern of the seven linear layers of each block of the language model ("q_proj" alone fits the tower)."""
        return rf".*{cls.language}.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

    # ---- text

    @abstractmethod
    def render(self, turns: Sequence[tuple[str, str | None]], system: str | None = None) -> str:
        """Text of a conversation of (prompt, answer); an answer of None ends it where the answer begins.

        `system` stands in place of what the family says first.
        """

    def encode_prompt(self, prompt: str, context: Context = ()) -> list[int]:
        """Token ids of a prompt, after its `context`, up to where the answer begins, one image token per `<image>`.

        Raises ValueError if a text holds another special token of the tokenizer.
        """
        for text in (*(text for _, text in context), prompt):
            self._checked(text.replace(IMAGE, "\n"), "a prompt")  # "" would join what stands around a picture
        return self._tokens(prompt, None, context)

    def encode_answer(self, prompt: str, answer: str, context: Context = ()) -> list[int]:
        """Token ids of the answer as it stands behind the prompt, with the end token.

        Tokenised in context, because a tokenizer may merge across a boundary that is tokenised in two pieces. Raises
        ValueError if the answer changes the tokens of the prompt before it, or holds a special token.
        """
        before = self.encode_prompt(prompt, context)
        whole = self._tokens(prompt, self._checked(answer, "an answer"), context)
        if whole[: len(before)] != before:
            raise ValueError("the answer's first characters change the tokens of the prompt: trim its leading blanks")
        if whole[-1] != self.tokenizer.eos_token_id:
            raise ValueError(f"the tokenizer does not read {self.end} as its end token ({self.tokenizer.eos_token_id})")
        return whole[len(before) :]

    def _tokens(self, prompt: str, answer: str | None, context: Context) -> list[int]:
        system = next((text for role, text in context if role == "system"), None)
        said = [text for role, text in context if role != "system"]
        turns = [*zip(said[::2], said[1::2], strict=True), (prompt, answer)]
        return self.tokenizer(self.render(turns, system))["input_ids"]

    def _checked(self, text: str, what: str) -> str:
        """The text itself: what the model would read as a token of its own is refused, never tokenised as such."""
        for token in self._specials:
            if token in text:
                raise ValueError(f"{what} must not contain {token!r}, which {self.name} reads as a special token")
        return text

    # ---- pictures

    def num_image_tokens(self, size: tuple[int, int] | None) -> int:
        """Tokens in a prompt of a picture of (width, height) px; a fixed family needs no size."""
        return len(self.image(size).ids)

    @abstractmethod
    def image(self, size: tuple[int, int]) -> ImageTokens:
        """The tokens of a picture of (width, height) px."""

    @abstractmethod
    def pixels(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What the model takes of pictures, as keyword arguments; those of several prompts are joined along axis 0."""

    def expand(self, ids: Sequence[int], images: Sequence[ImageTokens]) -> list[int]:
        """Ids of a prompt with every image token replaced by the tokens of its picture. Raises ValueError."""
        if ids.count(self.image_id) != len(images):
            raise ValueError(f"{ids.count(self.image_id)} image tokens for {len(images)} images")
        own = iter(images)
        return [t for token in ids for t in (next(own).ids if token == self.image_id else (token,))]
