"""The one attention function: SDPA, plus region masses, packed pairs and scaled rows where a `Plan` asks for them.

It is registered with transformers under `NAME` for the language model only; without a plan it is transformers' own
SDPA, bit for bit. The plan travels as a keyword argument of the model's forward; a region's mass comes back as that
layer's "attention weights" (`outputs.attentions`, selected layers only).

Letters: B batch, H heads, Q query rows, K keys, D head size, S tokens of a packed row, R regions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llava.scaling import Scale, scale_scores

NAME = "llava_region"
ALIGNED = 16  # numbers


@dataclass(frozen=True, eq=False)
class Tree:
    """One packed pair: half-open slices of the row for the shared prompt and for each answer's branch."""

    prompt: tuple[int, int]
    branches: tuple[tuple[int, int], ...]  # contiguous, the first one right after the prompt
    mask: Tensor | None  # (rows of the later branches, K) bool: what they see from the prompt's start on
    _biases: dict[tuple, Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, prompt: tuple[int, int], branches: tuple[tuple[int, int], ...]) -> "Tree":
        """The tree with its mask, built once per row and not once per layer."""
        if len(branches) < 2:
            return cls(prompt, branches, None)
        begin, first_end, end = prompt[0], branches[0][1], branches[-1][1]
        mask = torch.zeros(end - first_end, end - begin, dtype=torch.bool)
        mask[:, : prompt[1] - begin] = True
        for start, stop in branches[1:]:
            rows, keys = slice(start - first_end, stop - first_end), slice(start - begin, stop - begin)
            mask[rows, keys] = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
        return cls(prompt, branches, mask)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Tree":
        """The same tree with its mask changed, as it is when moved."""
        return self if self.mask is None else replace(self, mask=change(self.mask))

    def bias(self, like: Tensor, rows: str = "later") -> Tensor:
        """(rows, K) what is added to scores of `like`'s type and device: 0, or -inf where a row does not look.

        `rows` are those of the "later" branches, of the "first", or of "all". Made once, not in every layer, as SDPA
        would of a boolean mask; lines begin at multiples of 16 numbers, as the memory-efficient kernel wants them.
        """
        key = rows, like.dtype, like.device
        if key not in self._biases:
            seen = self._seen(rows, like.device)
            bias = like.new_zeros(len(seen), -(-seen.shape[1] // ALIGNED) * ALIGNED)[:, : seen.shape[1]]
            self._biases[key] = bias.masked_fill_(~seen, -torch.inf)
        return self._biases[key]

    def _seen(self, rows: str, device: torch.device) -> Tensor:
        if rows == "later":
            return self.mask
        start, stop = (end - self.prompt[0] for end in self.branches[0])
        first = torch.ones(stop - start, stop, dtype=torch.bool, device=device).tril(start)
        if rows == "first" or self.mask is None:
            return first
        return torch.cat([F.pad(first, (0, len(self.mask))), self.mask])


@dataclass(frozen=True, eq=False)
class Probe:
    """What to measure: the attention mass on regions, from the rows that predict an answer.

    With trees in the plan the rows are those of every first branch (the chosen answer), the `first_row` of each alone,
    or those of `each_branch`, in row order: a second attention call. Without trees it is the last row of the forward
    (generation), a softmax.
    """

    regions: Tensor  # (B or 1, S, R) weights in [0, 1]; keys past S (generated tokens) weigh nothing
    layers: frozenset[int]  # zero-based
    each_key: bool = False  # after the regions come the S keys, one column each (generation only)
    each_branch: bool = False
    first_row: bool = False


@dataclass(frozen=True, eq=False)
class Plan:
    """What the attention function shall do beyond plain SDPA; an empty plan changes nothing."""

    trees: tuple[Tree, ...] = ()
    probe: Probe | None = None
    scale: Scale | None = None


@dataclass
class Ambient:
    """The plan of all forwards inside a `use_plan`; it may be exchanged between two of them."""

    plan: Plan


_ambient: ContextVar[Ambient | None] = ContextVar("plan", default=None)


@contextmanager
def use_plan(plan: Plan) -> Iterator[Ambient]:
    """Apply a plan to every forward inside, for `generate`, which refuses keyword arguments it does not know.

    Raises RuntimeError if gradients are enabled: a checkpointed layer is recomputed in another thread, which would
    not see the plan. Training passes `plan=` to the forward instead.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("use_plan is for inference: call it under torch.no_grad(), or pass plan= to the forward")
    ambient = Ambient(plan)
    token = _ambient.set(ambient)
    try:
        yield ambient
    finally:
        _ambient.reset(token)


def install(model) -> None:
    """Make the model's language model use this function. transformers does not save it: call after every load.

    cuDNN's attention is off from then on, in the whole process. torch prefers it on an H100, and it builds a plan for
    every new shape, in each thread, forward and backward: 0.04 to 0.5 s a plan. Packed rows never have a length twice,
    and decoding has another one at every token. What torch takes then, flash and memory-efficient, needs no plan; on
    an A100 and on a CPU nothing changes.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    AttentionInterface.register(NAME, attention)
    # Without a mask function of the same name transformers hands over no mask at all, padding or not.
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation({"text_config": NAME})


def attention(
    module,
    query: Float[Tensor, "B H Q D"],
    key: Float[Tensor, "B Hkv K D"],
    value: Float[Tensor, "B Hkv K D"],
    attention_mask: Bool[Tensor, "B 1 #Q #K"] | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    plan: Plan | None = None,
    **kwargs,
) -> tuple[Float[Tensor, "B Q H D"], Float[Tensor, "B H T R"] | None]:
    """Attention output, and the region masses of this layer if the plan probes it (T measured rows), else None."""
    ambient = _ambient.get()
    plan = plan or (ambient and ambient.plan) or Plan()
    kwargs.pop("output_attentions", None)  # SDPA would warn; what it asks for is the second return value
    if plan.trees:
        is_open = attention_mask is None or attention_mask.numel() == 1
        assert is_open and len(query) == 1 and query.shape[2] == key.shape[2], "a packed row has no mask"
        out = tree_attention(query, key, value, plan.trees, scaling, dropout).transpose(1, 2)
    else:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    is_scaled = plan.scale is not None and plan.scale.applies(module.layer_idx, key.shape[2])
    is_probed = plan.probe is not None and module.layer_idx in plan.probe.layers
    if is_scaled:
        return _scaled(out, query, key, value, attention_mask, scaling, plan, module.layer_idx, is_probed)
    return out, _probed(query, key, attention_mask, scaling, plan) if is_probed else None


def tree_attention(
    query: Float[Tensor, "1 H S D"],
    key: Float[Tensor, "1 Hkv S D"],
    value: Float[Tensor, "1 Hkv S D"],
    trees: Sequence[Tree],
    scaling: float | None,
    dropout: float = 0.0,
) -> Float[Tensor, "1 H S D"]:
    """Attention over packed pairs: an answer sees its prompt and itself, nothing of another answer or pair.

    Two calls per tree: prompt with the first branch is plain causal attention (the fast kernels take it); the later
    branches are a few rows under an explicit mask. No S x S mask exists.
    """
    rows = (_by_tree(states, trees) for states in (query, _repeat_heads(query, key), _repeat_heads(query, value)))
    parts = []
    for tree, q, k, v in zip(trees, *rows, strict=True):
        first = tree.branches[0][1] - tree.prompt[0]  # rows of the prompt and the first branch
        head = q, k, v
        if tree.mask is not None:
            q, later = q.split([first, q.shape[2] - first], dim=2)
            head = q, k[:, :, :first], v[:, :, :first]
        parts.append(F.scaled_dot_product_attention(*head, is_causal=True, scale=scaling, dropout_p=dropout))
        if tree.mask is not None:
            mask = tree.bias(later)
            parts.append(F.scaled_dot_product_attention(later, k, v, attn_mask=mask, scale=scaling, dropout_p=dropout))
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _by_tree(states: Tensor, trees: Sequence[Tree]) -> tuple[Tensor, ...]:
    """The row cut into its trees. One cut: a slice for each tree has a gradient as long as the whole row for each."""
    if len(trees) == 1:
        return (states,)
    return states.split([tree.branches[-1][1] - tree.prompt[0] for tree in trees], dim=2)


def region_mass(
    query: Float[Tensor, "B H Q D"],
    key: Float[Tensor, "B H K D"],
    regions: Float[Tensor, "B K R"],
    mask: Tensor | None,
    scaling: float | None,
) -> Float[Tensor, "B H Q R"]:
    """Attention probability (0..1) that each row puts on each region: Σ_j A[b,h,q,j] · W[b,j,r].

    `mask` is boolean or added to the scores. A second attention call whose values are the region weights: exact,
    differentiable in query and key, and O(K) memory; one call for every D regions. Computed in fp32, because masses
    summed in bf16 are off by half a percent.
    """
    num_regions, head_size = regions.shape[-1], query.shape[-1]
    query, key, masses = query.float(), key.float(), []
    for part in regions.float().split(head_size, dim=-1):
        weights = F.pad(part, (0, head_size - part.shape[-1]))[:, None].expand(-1, query.shape[1], -1, -1)
        with torch.autocast(query.device.type, enabled=False):
            masses.append(F.scaled_dot_product_attention(query, key, weights, attn_mask=mask, scale=scaling))
    return masses[0][..., :num_regions] if len(masses) == 1 else torch.cat(masses, dim=-1)[..., :num_regions]


def _probed(query: Tensor, key: Tensor, attention_mask: Tensor | None, scaling: float | None, plan: Plan) -> Tensor:
    if not plan.trees:
        return _mass_of(_last_scores(query, key, attention_mask, scaling).softmax(dim=-1), plan.probe)
    key, regions, masses = _repeat_heads(query, key), plan.probe.regions, []
    for tree, q, k in zip(plan.trees, _by_tree(query, plan.trees), _by_tree(key, plan.trees), strict=True):
        begin = tree.prompt[0]
        start = tree.branches[0][0] - begin
        if plan.probe.first_row:  # it sees all before it
            bias, stop = None, start + 1
        else:
            bias = tree.bias(regions.float(), "all" if plan.probe.each_branch else "first")
            stop = bias.shape[1]
        own = regions[:, begin : begin + stop]
        masses.append(region_mass(q[:, :, start:stop], k[:, :, :stop], own, bias, scaling))
    return torch.cat(masses, dim=2)


def _scaled(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, plan: Plan,
    layer: int, is_probed: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The output with its last rows computed from scaled scores, and the last row's masses, as they then are."""
    assert not plan.trees, "packed rows are not scaled"
    scale = plan.scale.expand(len(query))
    rows = scale.factor.shape[1]
    scores = _last_scores(query, key, mask, scaling, rows)
    heads = scale.heads_of(layer, query.shape[1], query.device)
    # A row whose factor is 1 keeps its scores, and below the output that it has already. So does a head left alone.
    probabilities = scale_scores(scores, scale, heads).softmax(dim=-1)
    last = times_cached(probabilities, value).transpose(1, 2).to(out.dtype)
    changed = (scale.factor != 1)[..., None, None]
    if heads is not None:
        changed = changed & heads[:, None]
    out = torch.cat([out[:, :-rows], torch.where(changed, last, out[:, -rows:])], dim=1)
    return out, _mass_of(probabilities[:, :, -1:], plan.probe) if is_probed else None


def _last_scores(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, scaling: float | None, rows: int = 1
) -> Float[Tensor, "B H rows K"]:
    """Scores before the softmax of the last rows, in fp32; -inf where a key is not visible."""
    with torch.autocast(query.device.type, enabled=False):
        scores = times_cached(query[:, :, -rows:], key, is_transposed=True)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is None:
        return scores
    return scores.masked_fill(~attention_mask[:, :, -rows:, : key.shape[2]], -torch.inf)


def times_cached(
    rows: Float[Tensor, "B H Q X"], cached: Float[Tensor, "B Hkv K D"], is_transposed: bool = False
) -> Float[Tensor, "B H Q Y"]:
    """rows @ cached, or its transpose, in fp32; a cache in bf16 on a GPU is read as it is.

    A copy of all keys in fp32, for each of H heads, at every token and layer would cost more than attention itself.
    bf16 times bf16 is exact in fp32, and rows in fp32 are a sum of three in bf16, multiplied side by side.
    """
    if not reads_bf16(cached):
        wide = _repeat_heads(rows, cached).float()
        return rows.float() @ (wide.transpose(2, 3) if is_transposed else wide)
    # (B · Hkv, G · Q, X) by (B · Hkv, X, Y): the G heads that share keys and values stand below each other.
    grouped, stored = rows.unflatten(1, (cached.shape[1], -1)).flatten(2, 3).flatten(0, 1), cached.flatten(0, 1)
    parts, rest = [], grouped
    for _ in range(1 if rows.dtype == cached.dtype else 3):
        parts.append(rest.to(cached.dtype))
        rest = rest - parts[-1]
    product = product_in_fp32(torch.cat(parts, dim=1), stored.transpose(1, 2) if is_transposed else stored)
    return sum(product.chunk(len(parts), dim=1)).reshape(*rows.shape[:3], -1)


def reads_bf16(cached: Tensor) -> bool:
    """Whether torch multiplies this tensor as it is into fp32: on a GPU, without gradients, from torch 2.8 on."""
    is_there = "dtype" in torch.ops.aten.bmm.overloads()
    return is_there and cached.is_cuda and cached.dtype == torch.bfloat16 and not torch.is_grad_enabled()


def product_in_fp32(rows: Tensor, cached: Tensor) -> Tensor:
    """Batched product of bf16 matrices as fp32, which torch has for CUDA alone."""
    return torch.bmm(rows, cached, out_dtype=torch.float32)


def _mass_of(probabilities: Float[Tensor, "B H Q K"], probe: Probe) -> Float[Tensor, "B H Q R"]:
    """Mass on each region. Keys after the prompt weigh nothing; beams of one sample are neighbours in the batch."""
    times, length = len(probabilities) // len(probe.regions), probe.regions.shape[1]
    regions = probe.regions if times == 1 else probe.regions.repeat_interleave(times, dim=0)
    with torch.autocast(probabilities.device.type, enabled=False):
        mass = probabilities[..., :length] @ regions[:, None]
    return torch.cat([mass, probabilities[..., :length]], dim=-1) if probe.each_key else mass


def _repeat_heads(query: Tensor, key: Tensor) -> Tensor:
    return repeat_kv(key, query.shape[1] // key.shape[1])


def layer_range(num_layers: int, spec: str, reference: tuple[int, int] = (14, 22), depth: int = 32) -> frozenset[int]:
    """Zero-based layers of a spec: "auto", "all", "14-22" (inclusive) or "3,5,7".

    "auto" is the share of the depth that layers 14..22 are of LLaVA-1.5-7B's 32, at least one layer.
    Raises ValueError if the spec names a layer that the model lacks.
    """
    if spec == "auto":
        first, end = round(reference[0] * num_layers / depth), round((reference[1] + 1) * num_layers / depth)
        return frozenset(range(first, max(end, first + 1)))
    if spec == "all":
        return frozenset(range(num_layers))
    layers: set[int] = set()
    for part in spec.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise ValueError(f'layers {spec!r}: write "auto", "all", a range as "14-22" or a list as "3,5,7"')
        start = int(first)
        layers.update(range(start, min(int(last or first), max(start, num_layers)) + 1))
    if not layers or max(layers) >= num_layers:
        raise ValueError(f"layers {spec!r}: the language model has layers 0 to {num_layers - 1}")
    return frozenset(layers)


def mean_over_heads(
    masses: Float[Tensor, "*axes H T R"], weights: Float[Tensor, "*axes H #T"] | None = None
) -> Float[Tensor, "*axes T R"]:
    """Mean mass of each row over the heads: plain, or by weights (0 leaves a head out; they need not add up to 1)."""
    if weights is None:
        return masses.mean(dim=-3)
    weights = weights[..., None]
    return (masses * weights).sum(dim=-3) / weights.sum(dim=-3).clamp(min=1e-12)


def mean_over_layers(values: Float[Tensor, "L *axes"], selected: Float[Tensor, "L H"] | None = None) -> Tensor:
    """Mean over the probed layers. Where heads are selected (1, else 0) a layer counts by how many of its are.

    So every selected head counts the same, and all heads of some layers are those layers.
    """
    if selected is None:
        return values.mean(dim=0)
    shares = (selected.sum(dim=1) / selected.sum()).to(values)
    return (values * shares.view(-1, *[1] * (values.dim() - 1))).sum(dim=0)


def mean_masses(
    masses: Float[Tensor, "L H T R"], owner: Tensor, num_samples: int, weights: Float[Tensor, "L H #T"] | None = None
) -> Float[Tensor, "L N R"]:
    """Mean mass of each region over a sample's rows and the heads, per layer. `owner` (T,) is each row's sample.

    `weights` as of `mean_over_heads`.
    """
    rows = mean_over_heads(masses, weights)  # (L, T, R)
    sums = rows.new_zeros(len(rows), num_samples, rows.shape[-1]).index_add(1, owner, rows)
    counts = rows.new_zeros(num_samples).index_add(0, owner, rows.new_ones(len(owner)))  # bincount stops to look
    return sums / counts[:, None]


def attention_ratio(masses: Float[Tensor, "*axes 2"]) -> Float[Tensor, "*axes"]:
    """Share of the image attention on the target, from mean masses of (target, all images); R is its mean over layers.

    The denominator is kept above 1e-6, for prompts that put no attention on images at all.
    """
    return masses[..., 0] / masses[..., 1].clamp(min=1e-6)
