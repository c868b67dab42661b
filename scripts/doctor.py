"""Find what is wrong before a run does:
`python -m scripts.doctor --model_name_or_path MODEL --data_path DATA --image_folder IMAGES`

Checks the installation, the checkpoint (dialect, every tensor by name and shape), every record with its pictures, and
the attention term itself. Offline, in seconds for thousands of records. Lists all problems; exit code 1 if any.
"""

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
from llava.checkpoints import open_checkpoint
from llava.checks import check_pictures
from llava.command_line import flag, parse
from llava.families import Family
from llava.image import ImageStore
from llava.records import DataError, name_of, parse_preference, parse_question, read_json
from llava.runtime import git_commit, setup_logging, user_errors, versions, without_compiler
from scripts import selftest
from train.llava_hound_dpo.data import describe, tokenize_one, within_length

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


@dataclass(kw_only=True)
class DoctorSettings:
    """What is looked at; without any flag the installation alone."""

    model_name_or_path: str | None = flag("checkpoint or adapter of any dialect", None)
    base_model: str | None = flag("what an adapter stands on, instead of the base it names", None)
    image_tower: str | None = flag("vision tower of an original checkpoint", None)
    data_path: Path | None = flag("preference pairs (train.json) or a test set", None)
    image_folder: str | None = flag("folder, .zip or .tar of the pictures", None)
    model_max_length: int = flag("tokens that a pair may have", 4096)
    fix_list: Path | None = flag("write the ids of bad records here (JSON)", None)

    def __post_init__(self):
        if self.data_path and not (self.image_folder and self.model_name_or_path):
            raise ValueError("--data_path needs --image_folder and --model_name_or_path (for its tokenizer)")


def main() -> None:
    """Runs the sections that the flags allow."""
    setup_logging()
    without_compiler()
    with user_errors():
        (own,) = parse((DoctorSettings,), __doc__)
    report = Report()
    print("installation")
    check_installation(report)
    family = None
    if own.model_name_or_path:
        print("checkpoint")
        family = check_checkpoint(report, own)
    if own.data_path:
        print("data")
        check_data(report, own, family)
        if own.fix_list:
            own.fix_list.write_text(json.dumps(report.bad_records, indent=1) + "\n", encoding="utf-8")
            print(f"  ids of {len(report.bad_records)} bad records written to {own.fix_list}")
    print("no problem found" if not report.problems else f"{report.problems} problems found")
    sys.exit(1 if report.problems else 0)


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


def check_checkpoint(report: Report, own: DoctorSettings) -> Family | None:
    """Dialect, tensors, processor, and the attention term on its shape. Gives the family if there is one."""
    try:
        checkpoint = open_checkpoint(own.model_name_or_path, own.base_model, own.image_tower)
        report.ok(str(checkpoint))
        report.ok(f"{checkpoint.check_tensors():,} tensors, none missing, none left over")
        family = checkpoint.family
    except (ValueError, OSError) as error:
        report.bad(str(error))
        return None
    report.ok(f"processor fits the model, {family.num_image_tokens()} tokens per image")
    for name, problem in selftest.run(family):
        report.bad(f"{name}: {problem}") if problem else report.ok(name)
    return family


def check_data(report: Report, own: DoctorSettings, family: Family | None) -> None:
    """Every record: its fields, tokens, length and pictures."""
    if family is None:
        report.bad("records cannot be checked without a tokenizer: mend the checkpoint first")
        return
    try:
        raw, store = read_json(own.data_path), ImageStore(own.image_folder)
    except (ValueError, OSError) as error:
        report.bad(str(error))
        return
    pairs, questions, problems = [], [], []
    for number, record in enumerate(raw, 1):
        where = name_of(own.data_path, number, record)
        try:
            if is_question(record):
                questions.append(parse_question(record, where))
                continue
            pairs.append(tokenize_one(parse_preference(record, where), family, store))
        except (ValueError, OSError) as error:
            problems.append(f"{where}: {error}")
    problems += list(problems_of(within_length, pairs, own.model_max_length, "error"))
    records = [*(pair.record for pair in pairs), *questions]
    problems += list(problems_of(check_pictures, records, store, family, "full"))
    problems += repeated_ids(own.data_path, raw)
    report.bad_records = bad_ids(own.data_path, raw, problems)
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
