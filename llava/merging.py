"""Adapters merged into the weights below them in float32, whatever precision these are in, layer by layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@dataclass
class Rounding:
    """What became of the numbers that an adapter changes, when they were rounded to the precision of the result."""

    changed: int = 0
    lost: int = 0  # equal to the base's own after rounding: the adapter does nothing there

    @property
    def share(self) -> float:
        """Lost by changed, 0..1."""
        return self.lost / self.changed if self.changed else 0.0


def merge(model, dtype: torch.dtype | None = None) -> tuple[nn.Module, Rounding]:
    """The model below an adapter with the adapter in its weights, each rounded once, and what rounding did.

    All weights are in `dtype` then; None: in the one that they were in. Needs room for one layer more than the model.
    """
    rounding = Rounding()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            _merge_layer(module, dtype, rounding)
    merged = model.unload() if isinstance(model, PeftModel) else model
    return merged if dtype is None else merged.to(dtype), rounding


def _merge_layer(layer: BaseTunerLayer, dtype: torch.dtype | None, rounding: Rounding) -> None:
    base = layer.get_base_layer()
    own = base.weight.dtype
    layer.float()  # the adapter too: PEFT rounds what it adds to the adapter's precision
    before = base.weight.detach().clone()
    layer.merge()
    is_changed = base.weight != before
    base.to(dtype or own)
    if before.is_meta:
        return
    rounding.changed += int(is_changed.sum())
    rounding.lost += int((is_changed & (base.weight == before.to(base.weight.dtype))).sum())


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Inside, every module computes in float32 on weights that stay as they are, which needs room for one layer more.

    What a merge changes is then not mixed up with what computing in a lower precision does.
    """
    stored: dict[nn.Parameter, torch.Tensor] = {}

    def widen(module: nn.Module, _) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.dtype in (torch.bfloat16, torch.float16):
                stored[parameter], parameter.data = parameter.data, parameter.data.float()

    def restore(module: nn.Module, *_) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in stored:
                parameter.data = stored.pop(parameter)

    hooks = [module.register_forward_pre_hook(widen) for module in model.modules()]
    hooks += [module.register_forward_hook(restore) for module in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
