"""What is true of one model family and not of another: its prompts, its image tokens, the names of its modules.

A family is one file beside this one. Everything else (attention, scaling, losses, packing, answering) is neutral and
asks the family.

Letters: P image tokens of one picture, S tokens of a prompt.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from llava.records import IMAGE

Context = Sequence[tuple[str, str]]  # (role, text) before a prompt, as of `records.Prompt`
# What is no part of a module's own name: PEFT's and the wrappers of distributed or compiled models.
WRAPPERS = re.compile(r"^(base_model\.model\.|module\.|_orig_mod\.)+|\.(default|modules_to_save)(?=\.)")
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
ENCODED = ("pooler_output", "deepstack_features")  # of what a tower gives: what the language model reads


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """The tokens of one picture in a prompt, and which of its pixels each image token stands for."""

    ids: tuple[int, ...]  # as they stand in the prompt: image tokens, and the family's text around them if it has any
    areas: Float[Tensor, "P 4"]  # x0, y0, x1, y1 of each image token, in px of the stored picture; may reach outside it
    shape: tuple[int, int]  # rows and columns of the raster that heat maps are drawn on
    size: tuple[int, int]  # width and height of the stored picture in px

    def weights(self, box: Sequence[float]) -> Float[Tensor, " P"]:
        """Share (0..1) of each token's area that lies in `box` (x0, y0, x1, y1), in px of the stored picture.

        A border that cuts an area gives it a fractional weight.
        """
        return (self.shares(1, box[1::2]).float() * self.shares(0, box[0::2]).float())[:, 0]

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """The box (x0, y0, x1, y1) that all areas lie in, in px of the stored picture."""
        return (*self.areas[:, :2].amin(dim=0).tolist(), *self.areas[:, 2:].amax(dim=0).tolist())

    def raster(self, mass: Float[Tensor, " P"]) -> Float[Tensor, "rows cols"]:
        """The mass of the tokens shared out over a raster of `shape` on `extent`, by area; it keeps its sum."""
        x0, y0, x1, y1 = self.extent
        rows, cols = self.shape
        down = self.shares(1, torch.linspace(y0, y1, rows + 1, dtype=torch.float64))
        across = self.shares(0, torch.linspace(x0, x1, cols + 1, dtype=torch.float64))
        return torch.einsum("p,pr,pc->rc", mass.double(), down, across).to(mass)

    def shares(self, axis: int, edges: Sequence[float] | Tensor) -> Float[Tensor, "P N"]:
        """Share (0..1) of each token that lies between every two neighbouring edges, in px; axis 0 is x, 1 is y."""
        return span_shares(self.areas[:, axis::2], edges)


def span_shares(spans: Float[Tensor, "P 2"], edges: Sequence[float] | Tensor) -> Float[Tensor, "P N"]:
    """Share of each span (from, to) that lies between every two neighbouring edges, in float64."""
    edges = torch.as_tensor(edges, dtype=torch.float64)
    covered = torch.minimum(spans[:, 1:], edges[1:]) - torch.maximum(spans[:, :1], edges[:-1])
    return covered.clamp(min=0) / (spans[:, 1:] - spans[:, :1])


def grid_areas(box: Sequence[float], rows: int, cols: int) -> Float[Tensor, "P 4"]:
    """Areas (x0, y0, x1, y1) of a grid that covers a box, row by row, in float64."""
    left, top, right, bottom = box
    return areas_of(even_spans(left, right, cols), even_spans(top, bottom, rows))


def even_spans(start: float | Tensor, end: float | Tensor, number: int) -> Float[Tensor, "N 2"]:
    """So many spans (from, to) of one length that fill start..end, in float64."""
    edges = start + (end - start) * torch.linspace(0, 1, number + 1, dtype=torch.float64)
    return torch.stack([edges[:-1], edges[1:]], dim=-1)


def areas_of(columns: Float[Tensor, "C 2"], rows: Float[Tensor, "R 2"]) -> Float[Tensor, "P 4"]:
    """Areas (x0, y0, x1, y1) of the grid of such spans, row by row."""
    x, y = columns.expand(len(rows), -1, -1), rows[:, None].expand(-1, len(columns), -1)
    return torch.stack([x, y], dim=-1).reshape(-1, 4)


class Family(ABC):
    """A family bound to one checkpoint's config, tokenizer and image processor.

    `pad`: pictures are padded to a square first (`--image_aspect_ratio pad`), where the family knows such a thing;
    None: as the checkpoint says. Raises ValueError if the three are not of one model, saying what does not fit.
    """

    name: str
    model_types: tuple[str, ...]  # of config.json
    language = "language_model"  # parts of parameter names ...
    tower = "vision_tower"
    tower_sizes: tuple[str, ...] = (*SIZES, "image_size", "patch_size")  # numbers of its config, for `check_sizes`
    projectors: tuple[str, ...] = ("multi_modal_projector",)  # asked for before the tower, which may hold them
    vectors: tuple[str, ...] = ()  # parameters that count as projector but are no modules: LoRA leaves them as they are
    image_token: str  # text of an image token
    end: str  # text of the token that ends an answer
    shapes: tuple[str, ...] = ()  # of `pixels`: what is read on the CPU and stays there
    fixed = False  # a picture has as many tokens whatever its size
    source: Path | None = None  # folder that tokenizer and pictures' settings are from
    strategy: str | None = None  # `vision_feature_select_strategy` that is due: patches alone are image tokens
    older: tuple[tuple[re.Pattern, str], ...] = ()  # names of earlier transformers, and today's; the first that fits

    def __init__(self, config, tokenizer, image_processor, pad: bool | None = None):
        self.config, self.tokenizer, self.image_processor, self.pad = config, tokenizer, image_processor, pad
        self._specials = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        found = tokenizer.convert_tokens_to_ids(self.image_token)
        if found != self.image_id:
            raise ValueError(f"the tokenizer reads {self.image_token} as id {found}, the model has id {self.image_id}")

    @classmethod
    def fits(cls, config) -> bool:
        """Whether a config of one of `model_types`, or its `config.json`, is of this family and not of another."""
        return True

    @classmethod
    def check_config(cls, config) -> None:
        """Raises ValueError for a config that this code would read wrongly."""
        text = config.get_text_config()
        check_sizes(text, SIZES)
        check_sizes(config.vision_config, cls.tower_sizes)
        check_attention(text)
        found = getattr(config, "vision_feature_select_strategy", None)
        if cls.strategy and found != cls.strategy:
            raise ValueError(
                f"vision_feature_select_strategy is {found!r}; image tokens are the patches alone, as {cls.name} has "
                f"them with {cls.strategy!r}"
            )

    @classmethod
    def model_class(cls, config) -> Any:
        """transformers' class of a config."""
        return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]

    @classmethod
    def shrink(cls, config) -> None:
        """Make a config small in place, for a random twin: same tokens of the same pictures, seconds on a CPU."""
        text, vision = config.get_text_config(), config.vision_config
        share = max(1, text.num_attention_heads // (text.num_key_value_heads or text.num_attention_heads))
        text.hidden_size, text.intermediate_size, text.num_hidden_layers = 64, 96, 3
        text.num_attention_heads, text.num_key_value_heads, text.head_dim = 4, max(1, 4 // share), 16
        vision.hidden_size, vision.intermediate_size = 32, 64
        vision.num_hidden_layers, vision.num_attention_heads = 3, 2

    @classmethod
    def tower_shape(cls, config) -> tuple[int, int]:
        """(width, blocks whose attention sees all patches of a piece) of the tower."""
        return config.vision_config.hidden_size, config.vision_config.num_hidden_layers

    @abstractmethod
    def processor(self) -> Any:
        """What transformers' Trainer saves beside weights: tokenizer, or processor with the chat template."""

    @property
    @abstractmethod
    def chat_template(self) -> str:
        """As `save` writes it: pictures stand where the parts of a message have them."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write tokenizer, pictures' settings and chat template, as transformers and servers read them together."""

    def check_processor(self, settings: Mapping[str, Any]) -> str | None:
        """What plain transformers would do wrong with a folder's processor_config.json; None: nothing."""
        return None

    @property
    def image_id(self) -> int:
        """Id of an image token."""
        return self.config.image_token_id

    @property
    def end_id(self) -> int:
        """Id of the token that ends an answer."""
        return self.tokenizer.convert_tokens_to_ids(self.end)

    # ---- names

    @classmethod
    def part_of(cls, name: str) -> str:
        """The part of the model that a parameter belongs to, as `parts` calls it."""
        head = "lm_head" if "lm_head" in name else cls.language
        inside = cls.tower if cls.tower in name else head
        return cls.projectors[0] if any(part in name for part in (*cls.projectors, *cls.vectors)) else inside

    @classmethod
    def parts(cls) -> tuple[str, ...]:
        """Tower, projector, language model, head."""
        return cls.tower, cls.projectors[0], cls.language, "lm_head"

    @classmethod
    def projector_modules(cls, config) -> list[str]:
        """Ends of the names of the modules between tower and language model: what LoRA saves if they are trained."""
        return list(cls.projectors)

    @classmethod
    def bare_name(cls, name: str) -> str:
        """A tensor's name as the model has it, whatever PEFT, wrappers or an older transformers made of it."""
        bare = WRAPPERS.sub("", name)
        return next((ours + bare[found.end() :] for old, ours in cls.older if (found := old.match(bare))), bare)

    @classmethod
    def renewed(cls, names: Any) -> Any:
        """What names modules in an adapter's config (a pattern, a list, or a table) with today's names in it."""
        if isinstance(names, dict):
            return {cls.bare_name(f"{name}.").rstrip("."): value for name, value in names.items()}
        return names if names is None or isinstance(names, str) else [
            cls.bare_name(f"{name}.").rstrip(".") for name in names
        ]  # fmt: skip

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
        said = whole[len(before) :]
        if self.end_id not in said:
            raise ValueError(f"the tokenizer does not read {self.end} as its end token ({self.end_id})")
        return said[: said.index(self.end_id) + 1]  # behind it a template may begin the next turn

    def _tokens(self, prompt: str, answer: str | None, context: Context) -> list[int]:
        system = next((text for role, text in context if role == "system"), None)
        said = [text for role, text in context if role != "system"]
        turns = [*zip(said[::2], said[1::2], strict=True), (prompt, answer)]
        return self._encode(self.render(turns, system))

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def _checked(self, text: str, what: str) -> str:
        """The text itself: what the model would read as a token of its own is refused, never tokenised as such."""
        for token in self._specials:
            if token in text:
                raise ValueError(f"{what} must not contain {token!r}, which {self.name} reads as a special token")
        return text

    def without_specials(self, text: str) -> str:
        """A text without the special tokens that `transformers serve` leaves in the answers of some families."""
        return re.sub("|".join(map(re.escape, self._specials)), "", text)

    # ---- pictures

    def images(self, sizes: Sequence[tuple[int, int]]) -> list[ImageTokens]:
        """The tokens of all pictures of one prompt, of (width, height) px each."""
        return [self.image(size, len(sizes)) for size in sizes]

    def num_image_tokens(self, size: tuple[int, int] | None, count: int = 1) -> int:
        """Tokens in a prompt of a picture of (width, height) px, one of `count`; a fixed family needs no size."""
        return len(self.image(size, count).ids)

    @abstractmethod
    def image(self, size: tuple[int, int], count: int = 1) -> ImageTokens:
        """The tokens of a picture of (width, height) px in a prompt of `count` pictures."""

    @abstractmethod
    def patches(self, size: tuple[int, int] | None, count: int = 1) -> tuple[int, ...]:
        """Patches of each piece of such a picture that the tower looks at by itself; as many as all tiles have."""

    @abstractmethod
    def pixels(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What the model takes of the pictures of one prompt, as keyword arguments."""

    def join(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The pixels of several prompts as those of one batch."""
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def plain_pixels(self, pixels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the pixels of one prompt, what transformers' own processor makes of it, in its shapes."""
        return dict(pixels)

    def encode(self, model, pixels: Mapping[str, Tensor]) -> Any:
        """What the language model reads of pictures, to be given to `model_inputs`; `pixels` of one or more prompts."""
        found = model.get_image_features(**pixels, return_dict=True)
        # The tower's own states are left behind: they would stay in memory as long as this does.
        return type(found)(**{name: found[name] for name in ENCODED if found.get(name) is not None})

    @abstractmethod
    def cap(self, max_image_tokens: int) -> None:
        """Change the image processor so that a picture costs so many tokens at most. Raises ValueError."""

    def check_cap(self, max_image_tokens: int, least: int) -> None:
        """Raises ValueError if a picture costs more in any case."""
        if max_image_tokens < least:
            raise ValueError(f"--max_image_tokens {max_image_tokens}: {self.name} needs {least} for a picture")

    def expand(self, ids: Sequence[int], images: Sequence[ImageTokens]) -> list[int]:
        """Ids of a prompt with every image token replaced by the tokens of its picture. Raises ValueError."""
        if ids.count(self.image_id) != len(images):
            raise ValueError(f"{ids.count(self.image_id)} image tokens for {len(images)} images")
        own = iter(images)
        return [t for token in ids for t in (next(own).ids if token == self.image_id else (token,))]

    def positions(self, ids: Sequence[int], images: Sequence[ImageTokens]) -> Tensor:
        """(axes, S) position of every token of an expanded prompt; the same on all axes for its last one."""
        return torch.arange(len(ids))[None]


def model_inputs(features: Any, positions: Tensor) -> dict[str, Any]:
    """Keyword arguments of any family's model for encoded pictures and (axes, B, S) positions.

    The features are copied: transformers changes the object that it is given.
    """
    copied = type(features)(**features)
    return {"mm_encoder_outputs": {"image": copied}, "position_ids": position_ids(positions)}


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting for it."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def position_ids(positions: Tensor) -> Tensor:
    """(axes, B, S) positions as transformers takes them: (B, S) where there is one axis."""
    return positions[0] if len(positions) == 1 else positions


def check_sizes(config, names: Sequence[str]) -> None:
    """Raises ValueError for a size that is none."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} {value!r} of the {config.model_type}: a number from 1 is due")


def other_checkpoint(made: str, side: int) -> ValueError:
    """The error for an image processor that does not make the squares of `side` px that the vision tower takes."""
    return ValueError(
        f"the image processor makes {made} but the vision tower takes {side} x {side} px: processor and model are of "
        "different checkpoints"
    )


def miscounted(found: int, due: int, what: str = "tile") -> str | None:
    """What to say of a processor's settings that have another number of tokens for a picture or a tile."""
    if found == due:
        return None
    return f"its processor counts {found} tokens for a {what}, the model takes {due}: plain transformers stops at it"


def check_attention(text) -> None:
    """Raises ValueError for a language model whose attention is more than a softmax over all that came before."""
    other = sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    window = getattr(text, "sliding_window", None)
    problem = None
    if other:
        problem = f"has layers of {', '.join(other)}, whose state runs from one answer of a packed row into the next"
    elif getattr(text, "attn_logit_softcapping", None):
        problem = "caps its attention scores (attn_logit_softcapping), which no fast kernel does"
    elif getattr(text, "use_bidirectional_attention", None):
        problem = "sees parts of a prompt both ways (use_bidirectional_attention), which packed rows do not"
    elif window is not None and window < text.max_position_embeddings:
        problem = (
            f"sees the last {window} tokens alone in some layers (sliding_window), but rows may have "
            f"{text.max_position_embeddings}"
        )
    if problem:
        raise ValueError(f"the language model {text.model_type} {problem}: it is not supported")
