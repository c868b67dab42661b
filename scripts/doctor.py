"""Find what is wrong before a run does:
`python -m scripts.doctor --model_name_or_path MODEL --data_path DATA --image_folder IMAGES`

Checks the installation, the checkpoint (dialect, every tensor by name and shape), every record with its pictures, and
the attention term itself. Offline, in seconds for thousands of records. Lists all problems; exit code 1 if any.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions
from pathlib import Path

import torch

import data_gen
import inference
import inference_optimization
import llava
import train
from llava.checkpoints import check_tensors, find_source, image_tokens, load_config, load_processor
from llava.checks import check_pictures
from llava.image import ImageStore
from llava.layout import PatchGrid
from llava.records import DataError, name_of, parse_preference, parse_question, read_json
from llava.runtime import ArgumentParser, git_commit, setup_logging, versions, without_compiler
from scripts import selftest
from train.llava_hound_dpo.data import describe, tokenize, within_length

ROOT = Path(__file__).resolve().parent.parent
OURS = "attention-aware-dpo"
SHOWN = 50  # problems printed per section; all of them count, and all go into --fix-list


@dataclass
class Report:
    """Prints as it goes and counts what failed."""

    problems: int = 0
    bad_records: list[str] = field(default_factory=list)

    def ok(self, text: str) -> None:
        """A check that passed, or a fact."""
        print(f"  ok    {text}")

    def bad(self, text: str) -> None:
        """A check that failed."""
        self.problems += 1
        print(f"  FAIL  {text}")


def main() -> None:
    """Runs the sections that the arguments allow."""
    args = parse_args()
    setup_logging()
    without_compiler()
    report = Report()
    print("installation")
    check_installation(report)
    processor = None
    if args.model_name_or_path:
        print("checkpoint")
        processor = check_checkpoint(report, args)
    if args.data_path:
        print("data")
        check_data(report, args, processor)
        if args.fix_list:
            args.fix_list.write_text(json.dumps(report.bad_records, indent=1) + "\n", encoding="utf-8")
            print(f"  ids of {len(report.bad_records)} bad records written to {args.fix_list}")
    print("no problem found" if not report.problems else f"{report.problems} problems found")
    sys.exit(1 if report.problems else 0)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model_name_or_path", help="checkpoint or adapter of any dialect")
    parser.add_argument("--image_tower", help="vision tower of an original checkpoint")
    parser.add_argument("--data_path", type=Path, help="preference pairs (train.json) or a test set")
    parser.add_argument("--image_folder", help="folder, .zip or .tar of the pictures")
    parser.add_argument("--model_max_length", type=int, default=4096, help="tokens that a pair may have")
    parser.add_argument("--fix_list", "--fix-list", type=Path, help="write the ids of bad records here (JSON)")
    args = parser.parse_args()
    if args.data_path and not (args.image_folder and args.model_name_or_path):
        parser.error("--data_path needs --image_folder and --model_name_or_path (for its tokenizer)")
    return args


def check_installation(report: Report) -> None:
    """Versions, devices, and packages of the same name from elsewhere."""
    report.ok(", ".join(f"{name} {number}" for name, number in versions().items()))
    report.ok(f"commit {git_commit()}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report.ok(f"devices: {', '.join(devices) or 'CPU only'}")
    for package in (llava, train, inference, inference_optimization, data_gen):
        place = Path(package.__file__).resolve()
        if ROOT not in place.parents:
            report.bad(f"`import {package.__name__}` gives {place}, not this repository: use a fresh environment")
    installed = packages_distributions()
    for name in ("llava", "train", "inference", "inference_optimization", "data_gen", "scripts"):
        for distribution in sorted(set(installed.get(name, ())) - {OURS}):
            report.bad(f"the package {distribution} also brings a module `{name}`: pip uninstall {distribution}")


def check_checkpoint(report: Report, args: argparse.Namespace):
    """Dialect, tensors, processor, and the attention term on its shape. Gives the processor if there is one."""
    try:
        source = find_source(args.model_name_or_path, args.image_tower)
        report.ok(str(source))
        config = load_config(args.model_name_or_path, args.image_tower)
        report.ok(f"{check_tensors(args.model_name_or_path, args.image_tower):,} tensors, none missing, none left over")
    except (ValueError, OSError) as error:
        report.bad(str(error))
        return None
    try:
        processor = load_processor(args.model_name_or_path, args.image_tower)
        PatchGrid.of(processor.image_processor, config.vision_config, pad=True)
    except (ValueError, OSError) as error:
        report.bad(str(error))
        return None
    report.ok(f"processor fits the model, {image_tokens(config)} tokens per image")
    for name, problem in selftest.run(config, processor.image_processor):
        report.bad(f"{name}: {problem}") if problem else report.ok(name)
    return processor


def check_data(report: Report, args: argparse.Namespace, processor) -> None:
    """Every record: its fields, tokens, length and pictures."""
    if processor is None:
        report.bad("records cannot be checked without a tokenizer: mend the checkpoint first")
        return
    try:
        raw, store = read_json(args.data_path), ImageStore(args.image_folder)
    except (ValueError, OSError) as error:
        report.bad(str(error))
        return
    config = load_config(args.model_name_or_path, args.image_tower)
    grid = PatchGrid.of(processor.image_processor, config.vision_config, pad=True)
    pairs, questions, problems = [], [], []
    for number, record in enumerate(raw, 1):
        where = name_of(args.data_path, number, record)
        try:
            if is_question(record):
                questions.append(parse_question(record, where))
                continue
            parsed = parse_preference(record, where)
            pairs += tokenize([parsed], processor.tokenizer, config.image_token_id, grid.num_tokens)
        except DataError as error:
            problems += error.problems
        except ValueError as error:
            problems.append(f"{where}: {error}")
    problems += list(problems_of(within_length, pairs, args.model_max_length, "error"))
    records = [*(pair.record for pair in pairs), *questions]
    problems += list(problems_of(check_pictures, records, store, grid, "full"))
    problems += repeated_ids(args.data_path, raw)
    report.bad_records = bad_ids(args.data_path, raw, problems)
    for problem in problems[:SHOWN]:
        report.bad(problem)
    if len(problems) > SHOWN:
        report.problems += len(problems) - SHOWN
        print(f"  ...   and {len(problems) - SHOWN} more")
    if records:
        report.ok(f"{len(raw):,} records, {len(report.bad_records):,} of them bad")
    if questions:
        report.ok(f"questions of a test set: {dict(Counter(question.image_type for question in questions))}")
    if pairs:
        counts = describe(pairs)
        report.ok(f"formats: {counts['by_format']}, images: {counts['by_images']} (number in a prompt: pairs)")
        report.ok(f"tokens of prompt and longer answer: {counts['tokens']}")


def is_question(record) -> bool:
    """Whether a record is of a test set: it has the true answer, and no pair of a better and a worse one."""
    return isinstance(record, dict) and "answer" in record and "chosen" not in record


def problems_of(check, *arguments) -> Iterator[str]:
    """What a check that raises would have said."""
    try:
        check(*arguments)
    except DataError as error:
        yield from error.problems


def repeated_ids(path: Path, raw: list) -> list[str]:
    """Ids that several records share."""
    counts = Counter(str(record["id"]) for record in raw if isinstance(record, dict) and "id" in record)
    return [
        f"{name_of(path, number, record)}: the id is used {counts[str(record['id'])]} times"
        for number, record in enumerate(raw, 1)
        if isinstance(record, dict) and counts.get(str(record.get("id")), 0) > 1
    ]


def bad_ids(path: Path, raw: list, problems: list[str]) -> list[str]:
    """Ids (or "record N" without one) of the records that any problem names."""
    named = {problem.split(": ", 1)[0] for problem in problems}
    bad = []
    for number, record in enumerate(raw, 1):
        if name_of(path, number, record) in named:
            has_id = isinstance(record, dict) and "id" in record
            bad.append(str(record["id"]) if has_id else f"record {number}")
    return bad


if __name__ == "__main__":
    main()
