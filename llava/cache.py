"""Keys and values of the tokens so far, in memory with room for those to come.

transformers' own cache is a new tensor at every token, and so writes all keys and values of the prompt anew.

Letters: B rows, H heads that have keys of their own, K tokens, D head size.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer

ROOM = 128  # tokens that a layer grows by at least: as many as an answer has at most unless something else is asked for


class RoomyLayer(DynamicLayer):
    """A layer whose `keys` and `values` (B, H, K, D) are the beginnings of longer tensors."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with no token and no room."""
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = self._whole = key_states[:, :, :0], value_states[:, :, :0]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append keys and values; those of all tokens so far, as views that the next `update` leaves alone."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, stop = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if stop > self._whole[0].shape[2]:
            self._whole = tuple(_with_room(held, stop + ROOM) for held in (self.keys, self.values))
        for whole, new in zip(self._whole, (key_states, value_states), strict=True):
            whole[:, :, start:stop] = new
        self._show(stop)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As of the parent, the room too."""
        with self._all_of_it():
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As of the parent, the room too."""
        with self._all_of_it():
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """As of the parent, the room too."""
        with self._all_of_it():
            super().batch_select_indices(indices)

    @contextmanager
    def _all_of_it(self) -> Iterator[None]:
        """Let the parent change the rows of the longer tensors."""
        if not self.is_initialized:
            yield
            return
        length = self.keys.shape[2]
        self.keys, self.values = self._whole
        yield
        self._whole = self.keys, self.values
        self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = (whole[:, :, :length] for whole in self._whole)


def new_cache() -> Cache:
    """An empty cache of full attention, for one call of `generate` or of a model's forwards."""
    return Cache(layer_class_to_replicate=RoomyLayer)


def _with_room(held: Tensor, length: int) -> Tensor:
    longer = torch.empty((*held.shape[:2], length, held.shape[3]), dtype=held.dtype, device=held.device)
    longer[:, :, : held.shape[2]] = held
    return longer
