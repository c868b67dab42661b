"""Inference with attention ratios against generation without, and against the earlier way:
`python -m scripts.bench.inference` (some minutes on a CPU; --size 7b on a GPU)

In turn, over the same prompts (about as long as each other, as batches sorted by length are): ours (batched, attention
probed), `generate` batched without attention, and one prompt at a time, eager, with `output_attentions`: once
reading off only the rows it needs, once putting a whole attention matrix of every layer together first, as the earlier
public code did.
"""

import copy

import torch

from llava.attention import install, layer_range
from llava.generation import PromptBatch, generate
from scripts.bench import common
from scripts.miniature.model import build_model, build_processor


def main() -> None:
    """Times the four on a random model, with 2 and with 5 images, and on the miniature."""
    parser = common.parser(__doc__)
    parser.add_argument("--new_tokens", type=int, default=32, help="tokens of every answer")
    parser.add_argument("--batch_size", type=int, default=4, help="prompts at a time of the random model")
    args = parser.parse_args()
    device, dtype = common.device_and_dtype()
    processor = build_processor()
    small = build_model(processor, seed=0).to(device, dtype).eval()
    big, tiny = common.build(args.size, device, dtype), common.Pictures(36, 72, small.config.image_token_id)
    lines = [
        "| model, prompts | ours / `generate` without attention | one at a time, eager / ours | "
        "with whole matrices / ours | ours, prompts per s | ratios differ by |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, model, kind, size, images in (
        (f"{args.size}, 576 tokens an image", big, common.Pictures(), args.batch_size, 2),
        (f"{args.size}, 576 tokens an image", big, common.Pictures(), args.batch_size, 5),
        ("miniature, 36 tokens an image", small, tiny, 64, 4),
    ):
        batch = common.batch_of([images] * size, 40, images, kind).to(device)
        title = f"{name}, {size} x {images} images"
        lines.append(compare(title, copy.deepcopy(model), batch, processor.tokenizer, args))
    command = f"python -m scripts.bench.inference --size {args.size} --new_tokens {args.new_tokens}"
    common.record("Inference: time, median (lowest to highest) of paired runs", command, lines)


def compare(name: str, model, batch: PromptBatch, tokenizer, args) -> str:
    """A row of the table."""
    layers = sorted(layer_range(model.config.text_config.num_hidden_layers, "auto"))
    plain, eager = copy.deepcopy(model), copy.deepcopy(model)
    install(model)
    eager.set_attn_implementation({"text_config": "eager"})
    settings = {"do_sample": False, "min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens}
    ratios: dict[str, list[float]] = {}

    def ours(repeat: int) -> None:
        answers = generate(model, tokenizer, batch, layers, pad_token_id=0, **settings)
        ratios["ours"] = [answer.ratio for answer in answers]

    def without(repeat: int) -> None:
        with torch.no_grad():
            plain.generate(**inputs_of(batch), pad_token_id=0, **settings)

    def loop(repeat: int) -> None:
        ratios["eager"] = [one_by_one(eager, one, layers, settings) for one in alone(batch)]

    def matrices(repeat: int) -> None:
        every = range(model.config.text_config.num_hidden_layers)
        for one in alone(batch):
            one_by_one(eager, one, list(every), settings, whole=True)

    runs = {"ours": ours, "without": without, "loop": loop, "matrices": matrices}
    seconds = common.alternate(runs, args.repeats)
    difference = max(abs(a - b) for a, b in zip(ratios["ours"], ratios["eager"], strict=True))
    rate = len(batch.input_ids) / sorted(seconds["ours"])[len(seconds["ours"]) // 2]
    cells = [common.ratio(seconds["ours"], seconds["without"])]
    cells += [common.ratio(seconds[way], seconds["ours"]) for way in ("loop", "matrices")]
    return f"| {name} | {' | '.join(cells)} | {rate:.2f} | {difference:.1e} |"


def inputs_of(batch: PromptBatch) -> dict[str, torch.Tensor]:
    """What `generate` of transformers takes."""
    return {name: getattr(batch, name) for name in ("input_ids", "attention_mask", "pixel_values")}


def alone(batch: PromptBatch) -> list[PromptBatch]:
    """Every prompt as a batch of one, without padding."""
    counts = [count - 2 for count in batch.num_regions]
    pixels = batch.pixel_values.split(counts)
    found = []
    for row, own in enumerate(pixels):
        kept = batch.attention_mask[row].bool()
        tensors = (batch.input_ids[row : row + 1, kept], batch.attention_mask[row : row + 1, kept], own)
        found.append(PromptBatch(*tensors, batch.regions[row : row + 1, kept], batch.num_regions[row : row + 1]))
    return found


@torch.no_grad()
def one_by_one(model, one: PromptBatch, layers: list[int], settings: dict, whole: bool = False) -> float:
    """The attention ratio of one answer, from attention maps."""
    out = model.generate(
        **inputs_of(one), pad_token_id=0, output_attentions=True, return_dict_in_generate=True, **settings
    )
    length, ratios = one.input_ids.shape[1], []
    for layer in layers:
        steps = [step[layer][0] for step in out.attentions]  # (H, S, S), then (H, 1, S + t)
        if whole:
            rows = assemble(steps)[:, length - 1 :, :length]
        else:
            rows = torch.stack([step[:, -1, :length] for step in steps], dim=1)
        target, images = rows.float().mean(dim=(0, 1)) @ one.regions[0, :, :2].float().to(rows.device)
        ratios.append(target / images)
    return torch.stack(ratios).mean().item()


def assemble(steps: list[torch.Tensor]) -> torch.Tensor:
    """(H, S + T - 1, S + T - 1) attention matrix of a layer on the CPU, in fp32."""
    size = steps[-1].shape[-1]
    matrix = torch.zeros(len(steps[0]), size, size)
    end = 0
    for step in steps:
        matrix[:, end : end + step.shape[1], : step.shape[2]] = step
        end += step.shape[1]
    return matrix


if __name__ == "__main__":
    main()
