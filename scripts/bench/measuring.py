"""What measuring given answers costs against generating them with the probe: `python -m scripts.bench.measuring`

All answers to one prompt in one packed pass; generated one by one, or as one batch of copies of the prompt. All ways
take turns in one run, and the numbers of the packed pass are compared with those of generation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import SuppressTokensLogitsProcessor

from llava.attention import install, layer_range
from llava.command_line import flag, parse
from llava.families import Family
from llava.generation import Generated, generate
from llava.markdown import table
from llava.measuring import measure
from llava.runtime import user_errors
from scripts.bench import common, generation

PAIRS = (
    ("generated one by one / measured", "each", "measured"), ("generated in one batch / measured", "batch", "measured"),
    ("measured / one answer's first token", "measured", "first"),
)  # fmt: skip


@dataclass(kw_only=True)
class Flags(generation.Flags):
    """What is measured."""

    prompts: int = flag("answers to the prompt", 4)
    images: int = flag("of the prompt", 4)


def main() -> None:
    """Measures and appends the table."""
    with user_errors():
        (own,) = parse((Flags,), __doc__)
    ways = build_ways(own, common.FAMILIES[own.family](own.size))
    found = {name: way() for name, way in ways.items()}  # warms up as well
    seconds = common.alternate(ways, own.repeats)
    rows = [(title, common.ratio(seconds[first], seconds[second])) for title, first, second in PAIRS]
    rows.append(("largest difference of ratio and confidence", f"{difference(found['each'], found['measured']):.1e}"))
    flags = " ".join(f"--{name} {getattr(own, name)}" for name in ("family", "size", "prompts", "images", "new_tokens"))
    command = f"python -m scripts.bench.measuring {flags} --repeats {own.repeats}"
    title = "Measuring given answers: time, median (lowest to highest) of paired runs"
    common.record(
        title, command, table(("ways", "first / second"), rows), common.PUBLISHED if own.publish else common.RESULTS
    )


def difference(generated: Sequence[Generated], measured: Sequence[Generated]) -> float:
    """Largest one of two accounts of the same answers."""
    pairs = list(zip(generated, measured, strict=True))
    assert all(one.tokens == other.tokens for one, other in pairs)
    numbers = [(one.ratio, other.ratio) for one, other in pairs] + [(one.confidence, o.confidence) for one, o in pairs]
    return max(abs(a - b) for a, b in numbers)


@torch.no_grad()
def build_ways(own: Flags, family: Family) -> dict[str, Callable[[], list[Generated]]]:
    """Every way to an account of the same number of sampled answers; a call gives it."""
    model = common.build_base(family)
    install(model)
    one, many = (generation.build_batch(family, replace(own, prompts=count)) for count in (1, own.prompts))
    layers = sorted(layer_range(len(model.model.language_model.layers), "auto"))

    def sampled(batch, seed=0, tokens=own.new_tokens) -> list[Generated]:
        torch.manual_seed(seed)
        return generate(
            model, family, batch, layers, do_sample=True, max_new_tokens=tokens, min_new_tokens=tokens,
            logits_processor=[SuppressTokensLogitsProcessor([family.image_id])],  # which no trained model says
        )  # fmt: skip

    def each() -> list[Generated]:
        return [answer for seed in range(own.prompts) for answer in sampled(one, seed)]

    answers = [answer.tokens for answer in each()]
    return {
        "each": each,
        "batch": lambda: sampled(many),
        "measured": lambda: measure(model, family, one, answers, layers),
        "first": lambda: sampled(one, tokens=1),
    }


if __name__ == "__main__":
    main()
