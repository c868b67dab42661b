"""Heat maps of where a model looks, on the original pictures, one PNG a prompt:
`python -m scripts.draw_attention --model_name_or_path MODEL --data_path test.json --image_folder IMAGES --output DIR`

Answers the questions and draws the attention mass of every image patch, averaged over layers and heads, with the target
outlined. With --answers, the answers of that file are looked at instead, whoever gave them.
"""

import argparse
import re
from pathlib import Path

import torch
from tqdm import tqdm

from llava.answering import dtype_of, make_batch, own_device, positive, prepare
from llava.checkpoints import load_model
from llava.conversation import encode_answer
from llava.generation import generate
from llava.heads import add_head_arguments
from llava.heatmap import attention_map, draw_prompt, patch_masses
from llava.layout import needs_sizes, target_box
from llava.records import read_answers
from llava.runtime import ArgumentParser, setup_logging, user_errors


def main() -> None:
    """Draws the maps of the chosen questions."""
    args = parse_args()
    setup_logging()
    with user_errors():
        job = prepare(args)
        texts = {a.question_id: a.text for a in read_answers(args.answers)} if args.answers else None
        chosen = choose(args, [question.id for question in job.questions], job.mapped, texts)
        args.output.mkdir(parents=True, exist_ok=True)
        model = load_model(job.path, dtype_of(args), args.image_tower).eval().to(own_device())
    for number in tqdm(chosen, desc="maps", unit="prompt"):
        question, tokenizer = job.questions[number], job.processor.tokenizer
        batch = make_batch(job, [number])
        if texts is None:
            tokens = generate(model, tokenizer, batch, [], max_new_tokens=args.max_new_tokens)[0].tokens
        else:
            tokens = encode_answer(tokenizer, question.prompt, texts[question.id])
        masses = patch_masses(model, tokenizer, batch, tokens, job.layers, job.image_token, heads=job.chosen)
        pictures = [job.store.open(name) for name in question.images]
        sizes = [picture.size for picture in pictures]
        box = target_box(question, sizes[0]) if needs_sizes(question) else None
        sheet = draw_prompt(pictures, attention_map(masses, sizes, job.grid), question.target, box, args.height)
        path = args.output / f"{file_name(question.id)}.png"
        sheet.save(path)
        tqdm.write(f"{path}  {question.prompt.splitlines()[-1]}  {tokenizer.decode(tokens, skip_special_tokens=True)}")


def parse_args() -> argparse.Namespace:
    """The command line, with what `prepare` needs."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="checkpoint or adapter of any dialect")
    add("--only_base_model", action="store_true", help="look with the base below the adapter")
    add("--image_tower", help="vision tower of an original checkpoint")
    add("--data_path", required=True, help="test set: JSON array or JSONL")
    add("--image_folder", required=True, help="folder, .zip or .tar of the pictures")
    add("--answers", type=Path, help="answers.jsonl whose answers are looked at (default: the model's own)")
    add("--output", type=Path, required=True, help="folder for the PNG files")
    add("--ids", nargs="+", help="questions to draw (default: --limit of them, spread over formats)")
    add("--limit", dest="attention_maps", type=positive, default=12, help="how many questions to draw without --ids")
    add("--attention_layers", default="auto", help="layers to average over: auto, 14-22 or 3,5")
    add_head_arguments(parser)
    add("--height", type=positive, default=336, help="px of a drawn picture")
    add("--max_new_tokens", type=positive, default=128, help="tokens of an answer at most")
    add("--image_aspect_ratio", choices=["pad", "crop"], default="pad", help="as in training")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="precision of the model")
    fixed = {"batch_size": 1, "temperature": 0.0, "top_p": 1.0, "num_beams": 1, "check_images": "exists"}
    return argparse.Namespace(**vars(parser.parse_args()), **fixed)


def choose(args: argparse.Namespace, ids: list[str], spread: frozenset[int], texts: dict | None) -> list[int]:
    """Numbers of the questions to draw. Raises ValueError for an id that is not there or has no answer."""
    wanted = args.ids or [ids[number] for number in sorted(spread)]
    for where, known in ((args.data_path, ids), (args.answers, texts)):
        missing = [id for id in wanted if known is not None and id not in known]
        if missing:
            raise ValueError(f"{where}: no {missing[0]!r} there ({len(missing)} of {len(wanted)} ids are missing)")
    return [ids.index(id) for id in wanted]


def file_name(id: str) -> str:
    """An id as a file name."""
    return re.sub(r"[^\w.-]+", "_", id)[:100]


if __name__ == "__main__":
    with torch.inference_mode():
        main()
