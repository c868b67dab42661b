"""Modes of a model, without what the libraries do for every module, layer or tensor each time they change one.

A micro-batch of 32 layers is hundreds of milliseconds of Python and dispatch, for which a GPU waits
(`python -m scripts.bench.dispatch`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpointing(model) -> dict[str, Any]:
    """What `torch.utils.checkpoint` need not do, which it does for every layer or every tensor that it keeps.

    Only dropout draws numbers that a recomputation has to draw again; what it saves is the same by its making.
    """
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    configs = [model.config, *(getattr(model.config, name) for name in model.config.sub_configs)]
    rates += [value for config in configs for name, value in vars(config).items() if "drop" in name]
    return {"use_reentrant": False, "preserve_rng_state": any(rates), "determinism_check": "none"}


@contextmanager
def already_training(model) -> Iterator[None]:
    """Inside, `model.train()` does nothing: it walks over all modules, 3,000 of a 7B model with LoRA."""
    model.train = lambda mode=True: model
    try:
        yield
    finally:
        del model.train


def switches(model) -> list[BaseTunerLayer | AuxiliaryTrainingWrapper]:
    """What an adapter is switched off at: its layers, and modules that it has another copy of."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


@contextmanager
def adapter_off(parts: Sequence[BaseTunerLayer | AuxiliaryTrainingWrapper]) -> Iterator[None]:
    """As `PeftModel.disable_adapter()`, which looks through all modules three times, for the `switches` of a model.

    Set is the flag alone that their forwards ask: `enable_adapters` has every weight's `requires_grad` change as well.
    """
    before = [part.disable_adapters for part in parts]
    try:
        for part in parts:
            part._disable_adapters = True
        assert all(part.disable_adapters for part in parts), "peft has another flag now"
        yield
    finally:
        for part, was_off in zip(parts, before, strict=True):
            part._disable_adapters = was_off


@contextmanager
def without_gradient(layers: Sequence[GradientCheckpointingLayer]) -> Iterator[None]:
    """As `torch.no_grad()`; and none of the layers prepares for a recomputation that will not come."""
    checkpointed = [layer for layer in layers if layer.gradient_checkpointing]
    for layer in checkpointed:
        layer.gradient_checkpointing = False
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in checkpointed:
            layer.gradient_checkpointing = True
