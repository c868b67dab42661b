"""Memory of a training step, estimated and measured, without a GPU: `python -m scripts.bench.memory` (a minute)

The real model and the real step run on PyTorch's meta device, which has shapes and no numbers: what is measured is the
peak of all tensors alive beside the weights. Small tensors (ids, masks, positions) are real, as masks decide shapes.
"""

import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from llava.attention import install
from llava.command_line import flag, parse
from llava.families import Family
from llava.markdown import table
from llava.runtime import user_errors
from scripts.bench import common
from train.llava_hound_dpo.arguments import LossArguments, ModelArguments
from train.llava_hound_dpo.costs import PairShape
from train.llava_hound_dpo.data import PairCollator
from train.llava_hound_dpo.memory import GIB, Kept, Row, activation_bytes
from train.llava_hound_dpo.model import build_on_meta
from train.llava_hound_dpo.plan import shape_of
from train.llava_hound_dpo.scoring import score


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive, and their most so far; real tensors go where others are meta."""

    def __init__(self, model):
        super().__init__()
        self.now = self.most = 0
        for weight in (*model.parameters(), *model.buffers()):  # views of them are no memory either
            weight.untyped_storage()._is_counted = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs))):
            if function is torch.ops.aten.index.Tensor:
                args = (args[0], [own for index in args[1] for own in _numbers(index)])
            args, kwargs = tree_map(_to_meta, (args, kwargs))
            moved = "meta"
        else:
            moved = "cpu" if args and tree_leaves(args) else kwargs.get("device")  # what decides shapes stays real
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": moved}
        out = function(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage) -> None:
        if not hasattr(storage, "_is_counted"):
            storage._is_counted = True
            size = storage.nbytes()
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


def _numbers(index: Tensor | None) -> tuple[Tensor | None, ...]:
    """A mask as the positions that it keeps: of a mask on the meta device nobody knows how many."""
    is_mask = index is not None and index.dtype == torch.bool
    return index.nonzero().unbind(1) if is_mask else (index,)


def _to_meta(leaf):
    is_real = isinstance(leaf, Tensor) and not leaf.is_meta
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta") if is_real else leaf


def autocast_linear(input, weight, bias=None):
    """As torch.autocast has it, which passes meta tensors by; bf16."""
    return linear(*(own if own is None else own.bfloat16() for own in (input, weight, bias)))


linear = F.linear


def fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """Attention that keeps what GPU kernels keep, which the meta device would not choose: no scores."""
    bias = None if attn_mask is None else torch.empty(attn_mask.shape, dtype=query.dtype, device="meta")
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=bias, scale=scale)[0]


def peak(
    family: Family, batch: Mapping[str, Any], arguments: ModelArguments, checkpointing: bool = True,
    dtype: torch.dtype = torch.bfloat16, fp32_adapter: bool = False, reference: bool = True,
) -> int:  # fmt: skip
    """Most bytes beside weights in a step on a batch of `PairCollator`; gradients go as they come, as under ZeRO-2."""
    policy = untrained(family, arguments, checkpointing, dtype, fp32_adapter)
    with on_shapes(policy, fp32_adapter) as live:
        step(policy, family, batch, reference and arguments.lora_enable)
    return live.most


@contextmanager
def on_shapes(policy, casts: bool = False) -> Iterator[LiveBytes]:
    """What a model of the meta device needs to run, with the bytes that it keeps alive."""
    with (
        mock.patch.object(F, "scaled_dot_product_attention", fused_attention),
        mock.patch.object(torch, "autocast", lambda *_, **__: nullcontext()),  # which meta tensors have none of
        mock.patch.object(F, "linear", autocast_linear if casts else linear),
        LiveBytes(policy) as live,
    ):
        yield live


def untrained(family: Family, arguments: ModelArguments, checkpointing=True, dtype=torch.bfloat16, fp32_adapter=False):
    """The policy on the meta device, which drops gradients as they come."""
    policy = build_on_meta(family.config, arguments).to(dtype).train()
    for name, parameter in policy.named_parameters():
        if fp32_adapter and "lora_" in name:
            parameter.data = parameter.data.float()
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda own: setattr(own, "grad", None))
    install(policy.get_base_model() if arguments.lora_enable else policy)
    if checkpointing:
        policy.activation_checkpointing_enable()
    return policy


def step(policy, family: Family, batch, with_reference: bool) -> None:
    """Forward and backward as the trainer's."""
    row = batch["row"]
    with torch.no_grad():
        features = family.encode(getattr(policy, "get_base_model", lambda: policy)(), batch["pixels"])
        if with_reference:
            with policy.disable_adapter():
                score(policy, row, features)
    scores = score(policy, row, features, common.probed_layers(family.config), rows=LossArguments().attention_rows)
    (scores.chosen.sum() + scores.rejected.sum() + scores.masses.sum()).backward()


COLUMNS = ("family", "trained", "checkpointing", "tokens", "measured, GiB", "estimated, GiB", "difference")


@dataclass(kw_only=True)
class Flags:
    """What is measured."""

    size: str = flag("of the models", "7b", choices=list(common.SIZES))
    images: int = flag("of the pair's prompt", 5)
    publish: bool = flag("append to scripts/bench/RESULTS.md, which git keeps, and not to output/bench/", False)


def main() -> None:
    """Measures and appends the table."""
    with user_errors():
        (own,) = parse((Flags,), __doc__)
    rows = []
    for name, build in common.FAMILIES.items():
        family = build(own.size)
        with tempfile.TemporaryDirectory() as folder:
            pairs = common.build_pairs(Path(folder), common.Shape(own.images, 75, 75), family)
            batch = PairCollator(family, True)([pairs[0]])
        for rank, checkpointing in ((128, True), (128, False), (0, True)):
            rows.append([name, *compare(family, batch, shape_of(pairs.pairs[0], True), rank, checkpointing)])
    command = f"python -m scripts.bench.memory --size {own.size} --images {own.images}"
    to = common.PUBLISHED if own.publish else common.RESULTS
    common.record("Memory of a step on shapes alone", command, table(COLUMNS, rows), to)


def compare(family: Family, batch: Mapping[str, Any], shape: PairShape, rank: int, checkpointing: bool) -> list[object]:
    """Cells of a row."""
    arguments = ModelArguments("m", lora_r=rank) if rank else ModelArguments("m", lora_enable=False)
    measured = peak(family, batch, arguments, checkpointing) / GIB
    kept = Kept(checkpointing, rank, tuple(common.probed_layers(family.config)))
    row = Row(shape.tokens, shape.answers, sum(shape.patches))
    estimated = activation_bytes(family.config, row, kept) / GIB
    sizes = (f"{measured:.2f}", f"{estimated:.2f}", f"{estimated / measured - 1:+.1%}")
    return ["LoRA" if rank else "all", "on" if checkpointing else "off", shape.tokens, *sizes]


if __name__ == "__main__":
    main()
