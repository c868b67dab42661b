"""Which kernel each attention call of training and answering takes at 7B's shapes, and whether it is right."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from llava import attention
from llava.attention import Tree
from scripts.gpu_check.common import Finding, Settings, apart, exact, judged, kernels_of, limited, too_large

SECTION = "kernels"
COMPARED = 2  # heads that are computed again in plain fp32: all would not fit
LIMITS = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # of the relative error of an output or gradient of a dtype
FLASH, EFFICIENT = "flash", "memory-efficient"
PATTERNS = {  # in this order: cuDNN's kernels have "flash" in their names, too
    "cuDNN": ("cudnn",),
    EFFICIENT: ("fmha_cutlass", "memeff", "mem_eff", "efficient_attention"),
    FLASH: ("flash",),
    "math": ("softmax", "attention_math"),
}
ADVICE = {
    "cuDNN": "it builds a plan for every new length of a row: torch.backends.cuda.enable_cudnn_sdp(False)",
    "math": "no fast kernel took this call: is torch built for this GPU, and no flag set that turns kernels off?",
    "": "the profiler saw no attention kernel: is another process profiling, or CUPTI not there?",
}


@dataclass(frozen=True)
class Call:
    """One attention call. `run` and `reference` take the inputs (B, H, rows, D) and give an output (B, H, rows, D)."""

    name: str
    expected: set[str]  # kernels on a GPU
    inputs: Sequence[Tensor]
    run: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    trains: bool = False  # whether gradients are compared as well


def run(settings: Settings) -> Iterator[Finding]:
    """Kernels and errors of every call."""
    torch.manual_seed(0)
    for make in (packed_pair, region_masses, vision_tower, padded_prompts, one_token):
        try:
            with exact():
                yield from check(settings, make(settings))
        except torch.cuda.OutOfMemoryError as error:
            yield too_large(SECTION, make.__name__.replace("_", " "), error)


def check(settings: Settings, call: Call) -> Iterator[Finding]:
    """One call: its kernels, then its values on some heads."""
    ours = evaluate(call.run, call.inputs, call.trains)  # warms up
    kinds = classify(kernels_of(settings, lambda: evaluate(call.run, call.inputs, call.trains)))
    expected = call.expected if settings.on_gpu else {FLASH}  # which a CPU has for every mask
    due = f"due: {' + '.join(sorted(expected))}"
    advice = next((ADVICE[kind] for kind in sorted(kinds - expected) if kind in ADVICE), due if kinds else ADVICE[""])
    shown = " + ".join(sorted(kinds)) or "none seen"
    yield judged(SECTION, f"{call.name}: kernels", shown, kinds == expected, advice)
    theirs = evaluate(call.reference, [tensor[:, :COMPARED].float() for tensor in call.inputs], call.trains)
    for what, one, other in zip(("output", "dQ", "dK", "dV"), ours, theirs, strict=False):
        told = "these kernels do not compute attention on this machine: take another torch, or driver"
        error = apart(one[:, :COMPARED], other)
        yield limited(SECTION, f"{call.name}: error of {what}", error, LIMITS[one.dtype], told)


def evaluate(function: Callable[..., Tensor], inputs: Sequence[Tensor], trains: bool) -> list[Tensor]:
    """The output; and, of a fixed weighted sum of it, the gradients of the inputs."""
    inputs = [tensor.detach().requires_grad_(trains) for tensor in inputs]
    with torch.set_grad_enabled(trains):
        out = function(*inputs)
    if not trains:
        return [out]
    weights = torch.linspace(-1, 1, out.shape[-2] * out.shape[-1], device=out.device).view(out.shape[-2:])
    return [out, *torch.autograd.grad((out.float() * weights).sum(), inputs)]


def classify(names: Sequence[str]) -> set[str]:
    """Kinds of the attention kernels among the names of all kernels."""
    found = (next((kind for kind, parts in PATTERNS.items() if any(p in n.lower() for p in parts)), "") for n in names)
    return set(found) - {""}


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention by its definition; `mask` (..., Q, K) is True where a key is seen."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ value


def draw(settings: Settings, *shape: int) -> Tensor:
    """Normal numbers, of a scale at which attention is far from flat, or a wrong mask would hardly show."""
    return 1.5 * torch.randn(shape, device=settings.device).to(settings.dtype)


def regions(settings: Settings, batch: int, keys: int) -> Tensor:
    """(batch, keys, 2) weights of a target that is the first third of an image, and of the image."""
    weights = torch.zeros(batch, keys, 2, device=settings.device)
    weights[:, : keys // 3, 0] = weights[:, : keys - 9, 1] = 1
    return weights


def packed_pair(settings: Settings) -> Call:
    """Training: the prompt with the chosen answer is plainly causal, the rejected one has a mask."""
    own, device = settings.sizes, settings.device
    first = own.prompt + own.answers[0]
    length = first + own.answers[1]
    with torch.device(device):
        tree = Tree.of((0, own.prompt), ((own.prompt, first), (first, length)))
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask[first:] = tree.mask
    states = [draw(settings, 1, own.heads, length, 128) for _ in range(3)]

    def ours(*qkv: Tensor) -> Tensor:
        return attention.tree_attention(*qkv, (tree,), None)

    return Call("packed pair", {FLASH, EFFICIENT}, states, ours, lambda *qkv: plain(*qkv, mask), trains=True)


def region_masses(settings: Settings) -> Call:
    """Training: masses of the chosen answer's rows, in fp32."""
    own = settings.sizes
    rows, keys = own.answers[0], own.prompt + own.answers[0]
    mask = torch.ones(rows, keys, dtype=torch.bool, device=settings.device).tril(own.prompt)
    weights = regions(settings, 1, keys)
    states = [draw(settings, 1, own.heads, count, 128) for count in (rows, keys)]

    def ours(query: Tensor, key: Tensor) -> Tensor:
        return attention.region_mass(query, key, weights, mask[None, None], None)

    def theirs(query: Tensor, key: Tensor) -> Tensor:
        return plain(query, key, weights[:, None], mask)

    return Call("region masses", {EFFICIENT}, states, ours, theirs, trains=True)


def vision_tower(settings: Settings) -> Call:
    """CLIP's blocks."""
    states = [draw(settings, 5, 16, 577, 64) for _ in range(3)]
    mask = torch.ones(577, 577, dtype=torch.bool, device=settings.device)
    return Call("vision tower", {FLASH}, states, F.scaled_dot_product_attention, lambda *qkv: plain(*qkv, mask))


def padded_prompts(settings: Settings) -> Call:
    """Answering: left-padded prompts of a batch."""
    own = settings.sizes
    return _answering(settings, "padded prompts", own.prompt - 38, own.prompt - 38)


def one_token(settings: Settings) -> Call:
    """Answering: a token behind its cache."""
    return _answering(settings, "one token", 1, settings.sizes.prompt)


def _answering(settings: Settings, name: str, rows: int, keys: int) -> Call:
    own = settings.sizes
    mask = _padded(settings, rows, keys)
    states = [draw(settings, own.prompts, own.heads, count, 128) for count in (rows, keys, keys)]
    return Call(name, {EFFICIENT}, states, lambda *qkv: _attend(qkv, mask), lambda *qkv: plain(*qkv, mask))


def _padded(settings: Settings, rows: int, keys: int) -> Tensor:
    """(prompts, 1, rows, keys) causal mask; of every further prompt three tokens more are padding."""
    places = torch.arange(keys, device=settings.device)
    queries = places[-rows:, None]
    begin = 3 * torch.arange(settings.sizes.prompts, device=settings.device)[:, None, None, None]
    return (places <= queries) & ((places >= begin) | (places == queries))


def _attend(states: Sequence[Tensor], mask: Tensor) -> Tensor:
    """As a layer of the model calls it."""
    layer = SimpleNamespace(layer_idx=0, num_key_value_groups=1, is_causal=True, training=False)
    return attention.attention(layer, *states, mask)[0].transpose(1, 2)
