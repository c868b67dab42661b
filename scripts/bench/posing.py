"""A GPU that is none: tensors that say they are on `cuda:0`, hold CPU values, and note what would stop a real one.

Inside a `Posing`, `device="cuda"` makes such tensors, and `.to`, `.cpu` and their like move between them and the CPU's.
What mixes the two is refused as CUDA refuses it. Where Python would wait for the GPU (a value that is read, a size that
depends on values, a copy that blocks) the line of code is noted.

Weights may be without values (`pose(model)` of one on the meta device), so that 7B and 13B shapes take no memory. What
comes of them has none either; where it is asked for, numbers are 1, truths true, and whole numbers 0. What does not
come of weights (ids, masks, positions, regions) is real throughout.
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

GPU = torch.device("cuda", 0)
STAGED = 64 * 1024  # bytes that the driver copies aside at once, pinned or not
ROOTS = (f"{Path(__file__).parents[2]}/", "site-packages/")
aten = torch.ops.aten
# What CUDA's implementation reads back, and how often.
READS = {
    aten._local_scalar_dense.default: 1, aten.nonzero.default: 1, aten.masked_select.default: 1, aten.equal.default: 1,
    aten.bincount.default: 2, aten._unique2.default: 1, aten.unique_consecutive.default: 1,
}  # fmt: skip
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
UNKNOWN = {torch.bool: True}  # what is said of a value that comes of weights without any: else 1, whole numbers 0


class MixedDevices(RuntimeError):
    """Tensors of two devices in one operation."""


class OnGpu(Tensor):
    """A tensor of the CPU, or of the meta device if it has no values, that says it is on the GPU."""

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def get_device(self) -> int:
        """Number of the GPU."""
        return 0

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class Posing(TorchFunctionMode):
    """Notes while it lasts: `syncs` and `copies` (those that block) by the line of code, and all `operations`."""

    current: "Posing | None" = None

    def __init__(self):
        super().__init__()
        self.syncs: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.operations = 0

    def __enter__(self):
        Posing.current = self
        return super().__enter__()

    def __exit__(self, *error):
        Posing.current = None
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        own = MOVES.get(func)
        if own is not None:
            return own(self, *args, **kwargs)
        if is_gpu(kwargs.get("device")):
            return self.made(func, args, kwargs)
        return func(*args, **kwargs)

    def noted(self, func: Callable, args: tuple, kwargs: dict) -> None:
        """An operation below autograd."""
        self.operations += 1
        if reads := _reads(func, args, kwargs):
            self.syncs[line()] += reads

    def made(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """What a function makes on the GPU."""
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            return self.move(func(*args, **kwargs | {"device": "cpu"}), GPU)
        return posed(func(*args, **kwargs | {"device": "cpu"}))

    def move(self, tensor: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        """The same on another device."""
        if isinstance(tensor, OnGpu) == is_gpu(device):
            return tensor
        if is_gpu(device):
            is_held = getattr(tensor, "is_said_pinned", False) or tensor.nbytes <= STAGED
            if tensor.numel() and not (non_blocking and is_held):
                self.copies[line()] += 1
            return posed(tensor.detach().clone())
        self.syncs[line()] += 1
        return plain(invented(tensor))

    def to(self, tensor: Tensor, *args, **kwargs) -> Tensor:
        """`Tensor.to`."""
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        given = {name: value for name, value in kwargs.items() if name != "copy"}
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **given)
        moved = tensor if device is None else self.move(tensor, device, non_blocking)
        moved = moved if dtype is None else Tensor.to(moved, dtype)
        return moved.clone() if kwargs.get("copy") and moved is tensor else moved

    def read(self, tensor: Tensor, method: Callable) -> Any:
        """What a method of a tensor of the CPU gives."""
        return method(self.move(tensor, torch.device("cpu")))

    def pin(self, tensor: Tensor) -> Tensor:
        """`Tensor.pin_memory`."""
        if isinstance(tensor, OnGpu):
            raise RuntimeError("only tensors of the CPU can be pinned")
        copy = tensor.clone()
        copy.is_said_pinned = True
        return copy

    def backward(self, tensor: Tensor, *_, retain_graph: bool | None = None, **__) -> None:
        """`Tensor.backward` of a number; what is computed again meanwhile is watched, too."""
        with self:  # a mode is off in its own handler, and `torch.autograd.backward` would come here again
            torch.autograd.Variable._execution_engine.run_backward(
                (tensor,), (torch.ones_like(tensor),), bool(retain_graph), False, (), allow_unreachable=True,
                accumulate_grad=True,
            )  # fmt: skip

    def attention(self, *args, **kwargs) -> Tensor:
        """`scaled_dot_product_attention`, which below Python looks at where its arguments really are."""
        if not all(map(has_values, args[:3])):
            args = tuple(arg if not has_values(arg) else posed(_on_meta(arg)) for arg in args)
        return F.scaled_dot_product_attention(*args, **kwargs)

    def shown(self, tensor: Tensor, spec: str) -> str:
        """A number in an f-string, for which it is read."""
        return format(tensor.item() if isinstance(tensor, OnGpu) and tensor.dim() == 0 else tensor.tolist(), spec)


MOVES: dict[Callable, Callable] = {
    F.scaled_dot_product_attention: Posing.attention, Tensor.backward: Posing.backward, Tensor.to: Posing.to,
    Tensor.pin_memory: Posing.pin,
    Tensor.cpu: lambda self, tensor: self.move(tensor, torch.device("cpu")),
    Tensor.cuda: lambda self, tensor, *_, non_blocking=False: self.move(tensor, GPU, non_blocking),
    Tensor.tolist: lambda self, tensor: self.read(tensor, Tensor.tolist),
    Tensor.numpy: lambda self, tensor: self.read(tensor, Tensor.numpy),
    Tensor.is_pinned: lambda self, tensor, *_: getattr(tensor, "is_said_pinned", False),
    Tensor.__format__: Posing.shown, Tensor.__repr__: lambda self, tensor, **_: repr(plain(tensor)),
}  # fmt: skip


def pose(model: nn.Module) -> nn.Module:
    """The model itself, its weights on the GPU that is none; of one on the meta device they stay without values."""
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                new = nn.Parameter(posed(weight.detach()), requires_grad=weight.requires_grad)
                module._parameters[name] = known.setdefault(id(weight), new)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = posed(buffer if buffer.is_floating_point() else invented(buffer))
    return model


def posed(tensor: Tensor) -> Tensor:
    """A tensor that says it is on the GPU."""
    return tensor if isinstance(tensor, OnGpu) else Tensor._make_subclass(OnGpu, tensor.detach())


def plain(tensor: Tensor) -> Tensor:
    """The values as a tensor of the CPU."""
    with torch._C._DisableTorchDispatch():
        return Tensor._make_subclass(Tensor, tensor.detach())


def invented(tensor: Tensor) -> Tensor:
    """The tensor, or one of made-up values if it has none."""
    with torch._C._DisableTorchDispatch():
        if not has_values(tensor):
            value = UNKNOWN.get(tensor.dtype, 1 if tensor.is_floating_point() else 0)
            return torch.full(tensor.shape, value, dtype=tensor.dtype)
    return tensor


def has_values(tensor: Tensor) -> bool:
    """Whether it is not on the meta device."""
    return not Tensor.is_meta.__get__(tensor)


def is_gpu(device: Any) -> bool:
    """Whether a GPU is meant."""
    return device is not None and (isinstance(device, int) or torch.device(device).type == "cuda")


def line() -> str:
    """The line of code outside PyTorch that is being run."""
    frame = sys._getframe(1)
    while frame and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    if frame is None:
        return "backward"
    name = frame.f_code.co_filename
    for root in ROOTS:
        name = name.rpartition(root)[2]
    return f"{name}:{frame.f_lineno}"


def _run(func, args: tuple, kwargs: dict) -> Any:
    """One operation below autograd, with tensors on the GPU among its arguments."""
    if posing := Posing.current:
        posing.noted(func, args, kwargs)
    tensors = _tensors((args, kwargs))
    # Composite operations have tensors of their own, which say of themselves what they are.
    if func not in INDEXED and any(not isinstance(t, OnGpu) and t.dim() and has_values(t) for t in tensors):
        raise MixedDevices(f"{func} at {line()} of {[(tuple(t.shape), str(t.device)) for t in tensors]}")
    with torch._C._DisableTorchDispatch():
        if all(map(has_values, tensors)):
            return tree_map_only(Tensor, posed, func(*args, **kwargs))
        return _without_values(func, args, kwargs)


def _reads(func, args: tuple, kwargs: dict) -> int:
    """How often an operation on CUDA waits for a result."""
    if func is aten.repeat_interleave.Tensor:
        return int(kwargs.get("output_size") is None)
    masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)] if func in INDEXED else ()
    return READS.get(func, 0) + len(masks)


def _without_values(func, args: tuple, kwargs: dict) -> Any:
    """An operation's shapes."""
    if func is aten._local_scalar_dense.default:
        return UNKNOWN.get(args[0].dtype, 1.0)
    if func is aten.equal.default:
        return True
    if func in INDEXED:  # a mask says by its values how many it takes
        args = (args[0], [i for mask in args[1] for i in _places(mask)], *args[2:])
    if func is aten.masked_select.default:
        func, args = aten.index.Tensor, (args[0], list(_places(args[1])))
    on_meta = tree_map_only(Tensor, _on_meta, (args, kwargs))
    out = func(*on_meta[0], **on_meta[1])
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if written:  # what is written into keeps its values, if it has any
        return args[0] if written[0] in ("self", func._schema.arguments[0].name) else kwargs[written[0]]
    return tree_map_only(Tensor, lambda t: posed(t if t.is_floating_point() else invented(t)), out)


def _on_meta(tensor: Tensor) -> Tensor:
    return plain(tensor) if not has_values(tensor) else torch.empty_like(plain(tensor), device="meta")


def _places(mask: Tensor | None) -> tuple[Tensor | None, ...]:
    if mask is None or mask.dtype not in (torch.bool, torch.uint8):
        return (mask,)
    return plain(invented(mask)).nonzero(as_tuple=True)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
