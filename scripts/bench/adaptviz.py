"""What AdaptViz costs: `python -m scripts.bench.adaptviz` (some minutes on a CPU; --size 7b on a GPU)

In turn, over the same prompts of 2 and of 5 images: plain generation, AdaptViz (every sample scaled, so that the last
prompt token is always run again), the naive way (two whole generations, in the second one the scores scaled: with our
SDPA, and with eager attention as AdaptVis has it), and the tuner's grid of 37 variants for short answers.
"""

import copy

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from inference_optimization.llava_hound_dpo.adaptviz import AdaptViz, Bands
from inference_optimization.llava_hound_dpo.grid import PLAIN, Variant, answer_grid
from llava.attention import install
from llava.generation import generate
from scripts.bench import common
from scripts.bench.inference import inputs_of

FACTORS = (0.5, 0.8, 1.2, 1.5, 2.0, 3.0)
GRID = [PLAIN, *(Variant(s, r, f) for s in ("target", "all", "balance") for r in ("multiply", "add") for f in FACTORS)]
SHORT = 8  # tokens of a short answer, as the tuner is for


def main() -> None:
    """Times all of them on a random model."""
    parser = common.parser(__doc__)
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--batch_size", type=int, default=2, help="prompts of a batch")
    args = parser.parse_args()
    device, dtype = common.device_and_dtype()
    model = common.build(args.size, device, dtype)
    lines = [
        f"| images | AdaptViz / plain, {args.new_tokens} tokens | two generations, SDPA / AdaptViz | two generations, "
        f"eager / AdaptViz | grid of {len(GRID)} / plain, {SHORT} tokens |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for images in (2, 5):
        lines.append(compare(model, images, args))
    command = f"python -m scripts.bench.adaptviz --size {args.size} --new_tokens {args.new_tokens}"
    common.record("AdaptViz: time, median (lowest to highest) of paired runs", command, lines)


def compare(model, images: int, args) -> str:
    """A row of the table."""
    batch = common.batch_of([images] * args.batch_size, 40, images).to(model.device)
    tokenizer, settings = common.tokenizer(), {"do_sample": False, "pad_token_id": 0}
    eager = copy.deepcopy(model)
    install(model)
    AttentionInterface.register("scaled_eager", scaled_eager)
    AttentionMaskInterface.register("scaled_eager", eager_mask)
    eager.set_attn_implementation({"text_config": "scaled_eager"})
    eager.scaled_keys = batch.input_ids == common.Pictures().image_token

    def ours(tokens: int, steer=None) -> None:
        generate(model, tokenizer, batch, [], steer, min_new_tokens=tokens, max_new_tokens=tokens, **settings)

    @torch.no_grad()
    def twice(naive) -> None:
        for scaled in (False, True):
            for layer in naive.model.language_model.layers:
                layer.self_attn.scaled_keys = eager.scaled_keys if scaled and naive is eager else None
            length = {"min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens}
            naive.generate(**inputs_of(batch), **length, **settings)

    steer = AdaptViz(bands=Bands.fixed(1.5)).steer
    no_end = copy.deepcopy(tokenizer)
    no_end.eos_token = "<unk>"  # answers of the grid do not end early, so that they are as long as the plain ones
    runs = {
        "plain": lambda repeat: ours(args.new_tokens),
        "adaptviz": lambda repeat: ours(args.new_tokens, steer),
        "twice": lambda repeat: twice(model),
        "eager": lambda repeat: twice(eager),
        "short": lambda repeat: ours(SHORT),
        "grid": lambda repeat: answer_grid(model, no_end, batch, GRID, SHORT),
    }
    seconds = common.alternate(runs, args.repeats)
    pairs = (("adaptviz", "plain"), ("twice", "adaptviz"), ("eager", "adaptviz"), ("grid", "short"))
    return f"| {images} | " + " | ".join(common.ratio(seconds[a], seconds[b]) for a, b in pairs) + " |"


def scaled_eager(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Eager attention, image scores of the last row of a prefill scaled: AdaptVis as it was published."""
    scores = query @ key.transpose(2, 3) * scaling
    keys = getattr(module, "scaled_keys", None)
    if keys is not None and query.shape[2] == key.shape[2]:
        factor = torch.where(keys, 1.5, 1.0).to(scores.dtype)[:, None]
        scores[:, :, -1] = scores[:, :, -1] * factor
    if attention_mask is not None:
        scores = scores + attention_mask[:, :, :, : key.shape[2]]
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).contiguous(), None


if __name__ == "__main__":
    main()
