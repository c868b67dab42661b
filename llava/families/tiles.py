"""Pictures cut into tiles that the tower looks at one by one, and the grid that their patches are put together to.

Letters: R rows and C columns of a grid, N patches in a line. A span is (from, to) in px.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate
from transformers.image_processing_utils import get_patch_output_size
from transformers.image_utils import ChannelDimension
from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image

from llava.families.family import ImageTokens


@dataclass(frozen=True, eq=False)
class InterpolatedTokens(ImageTokens):
    """Tokens whose grid is interpolated from that of `finer` ones: each is a mix of its neighbours there."""

    finer: ImageTokens
    down: Float[Tensor, "rows R"]  # what each row has of each of the R finer ones
    across: Float[Tensor, "cols C"]  # likewise; the last column are the newlines

    def weights(self, box: Sequence[float]) -> Float[Tensor, " P"]:
        """Share (0..1) of each token that is from inside `box`: those of the finer tokens, mixed as their features."""
        return _mixed(self.finer.weights(box), self.down, self.across)

    def raster(self, mass: Float[Tensor, " P"]) -> Float[Tensor, "rows cols"]:
        """The mass of the tokens given back to the finer ones that they are mixed of, over the raster of these."""
        return self.finer.raster(_mixed(mass, self.down.T, self.across.T))


@dataclass(frozen=True)
class Tiles:
    """Squares of `side` px, of which whole patches of `patch` px are seen: the rest at right and below is not."""

    side: int
    patch: int
    limit: int  # tiles: a grid of a fifth more patches than these have is interpolated to about so many

    @property
    def rows(self) -> int:
        """Patches of a tile, down and across."""
        return self.side // self.patch

    def spans(self, number: int = 1) -> Float[Tensor, "N 2"]:
        """Where the patches of so many tiles in a line are, in px."""
        starts = self.side * torch.arange(number)[:, None] + self.patch * torch.arange(self.rows)
        return torch.stack([starts, starts + self.patch], dim=-1).flatten(0, 1).double()

    def squashed(self, size: tuple[int, int]) -> Float[Tensor, "R*C 4"]:
        """Areas, in px of a picture of (width, height), of one tile that it is squashed to."""
        return areas(self.spans() * size[1] / self.side, self.spans() * size[0] / self.side)

    def padded(self, size: tuple[int, int]) -> Float[Tensor, "R*C 4"]:
        """The same of one tile that it fills with what pads it to a square."""
        longer, own = max(size), self.spans() * max(size) / self.side
        return areas(own - (longer - size[1]) // 2, own - (longer - size[0]) // 2)

    def unpadded(self, size: tuple[int, int], canvas: tuple[int, int]) -> list[Float[Tensor, "N 2"]]:
        """Spans, in px of the picture, of the rows and of the columns that are left of its grid without padding.

        `canvas`: height and width in px of all tiles, which the picture fills as far as its shape lets it.
        """
        sides, spans = size[::-1], [self.spans(side // self.side) for side in canvas]
        filled = get_patch_output_size(torch.empty(3, *sides, device="meta"), canvas, ChannelDimension.FIRST)
        left = unpad_image(torch.empty(1, *map(len, spans), device="meta"), sides).shape[1:]
        return [
            (own[(len(own) - number) // 2 :][:number] - (whole - part) // 2) * stored / part
            for own, number, whole, part, stored in zip(spans, left, canvas, filled, sides, strict=True)
        ]

    def grid(self, token: int, size: tuple[int, int], canvas: tuple[int, int]) -> ImageTokens:
        """Tokens of a squashed tile, and of what is `unpadded` of a grid of tiles, interpolated if it is large.

        A newline at the end of each row stands for the strip of the picture that the row is on.
        """
        spans = self.unpadded(size, canvas)
        number = self._fewer(*map(len, spans))
        finer = self._tokens(token, size, *spans)
        if number == (*map(len, spans),):
            return finer
        own = self._tokens(token, size, *map(_even, spans, number))
        down, across = (_mix(len(whole), fewer) for whole, fewer in zip(spans, number, strict=True))
        across = torch.block_diag(across, torch.ones(1, 1))
        return InterpolatedTokens(own.ids, own.areas, finer.shape, size, finer, down, across)

    def number(self, size: tuple[int, int], canvas: tuple[int, int]) -> int:
        """Of the tokens of `grid`, which are not made for it."""
        return self._number(*map(len, self.unpadded(size, canvas)))

    def most(self, canvas: Sequence[int]) -> int:
        """Tokens that any picture may have on this canvas: its shape says what is left without padding."""
        rows, cols = (side // self.side * self.rows for side in canvas)
        narrower, lower = ((rows, n) for n in range(cols, -1, -2)), ((n, cols) for n in range(rows, -1, -2))
        return max(self._number(*left) for left in (*narrower, *lower))

    def _number(self, rows: int, cols: int) -> int:
        rows, cols = self._fewer(rows, cols)
        return self.rows**2 + rows * (cols + 1)

    def _fewer(self, rows: int, cols: int) -> tuple[int, int]:
        ratio = math.sqrt(rows * cols / (self.limit * self.rows**2))
        return (int(rows // ratio), int(cols // ratio)) if ratio > 1.1 else (rows, cols)

    def _tokens(self, token: int, size: tuple[int, int], down: Tensor, across: Tensor) -> ImageTokens:
        lines = areas(down, torch.cat([across, across.new_tensor([[0, size[0]]])]))
        both = torch.cat([self.squashed(size), lines])
        shape = max(self.rows, len(down)), max(self.rows, len(across))
        return ImageTokens((token,) * len(both), both, shape, size)


def areas(down: Float[Tensor, "R 2"], across: Float[Tensor, "C 2"]) -> Float[Tensor, "R*C 4"]:
    """Areas (x0, y0, x1, y1) of a grid, row by row."""
    x, y = across.expand(len(down), -1, -1), down[:, None].expand(-1, len(across), -1)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1).flatten(0, 1)


def _even(spans: Float[Tensor, "N 2"], number: int) -> Float[Tensor, "number 2"]:
    """So many spans of one length from where the first begins to where the last ends."""
    return torch.linspace(spans[0, 0], spans[-1, 1], number + 1, dtype=spans.dtype).unfold(0, 2, 1)


def _mix(number: int, fewer: int) -> Float[Tensor, "fewer number"]:
    """What each of `fewer` values has of each of `number`, in one direction of a bilinear interpolation."""
    return interpolate(torch.eye(number)[None], size=fewer, mode="linear")[0].T


def _mixed(values: Float[Tensor, " P"], down: Float[Tensor, "rows R"], across: Float[Tensor, "cols C"]) -> Tensor:
    """The squashed picture's values as they are, then those of the grid mixed."""
    rows, cols = down.shape[1], across.shape[1]
    whole, grid = values.split([len(values) - rows * cols, rows * cols])
    return torch.cat([whole, (down.to(grid) @ grid.view(rows, cols) @ across.to(grid).T).flatten()])
