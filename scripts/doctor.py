"""Find what is wrong before a run does:
`python -m scripts.doctor --model_name_or_path MODEL --data_path DATA --image_folder IMAGES`

Checks the installation, the checkpoint (dialect, every tensor by name and shape), every record with its pictures, and
the attention term itself. Offline, in seconds for thousands of records. Lists all problems, and what could not be
checked; exit code 1 if there is a problem.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import data_gen
import inference
import inference_optimization
import llava
import train
from llava import machine
from llava.checkpoints import open_checkpoint
from llava.checks import check_pictures
from llava.command_line import check_numbers, flag, parse
from llava.families import Family
from llava.image import ImageStore
from llava.messages import one_line
from llava.records import Preference, Prompt, name_of, parse_preference, parse_question, read_json
from llava.runtime import check_outputs, git_commit, setup_logging, user_errors, versions, without_compiler, write_text
from scripts import selftest
from train.llava_hound_dpo.data import Pair, describe, named_by, problems_of, tokenize_one, within_length

ROOT = Path(__file__).resolve().parent.parent
OURS = "attention-aware-dpo"
EXAMPLES = ((336, 336), (640, 480), (1424, 1464))  # px of a picture; the last: a published collage of nine
SHOWN = 50  # problems printed per section; all of them count, and all go into --fix-list


@dataclass
class Report:
    """Prints as it goes and counts what failed."""

    problems: int = 0
    unchecked: list[str] = field(default_factory=list)

    def ok(self, text: str) -> None:
        """A check that passed, or a fact."""
        print(f"  ok    {text}")

    def bad(self, text: str) -> None:
        """A check that failed."""
        self.problems += 1
        print(f"  FAIL  {one_line(text)}")

    def all_bad(self, texts: Sequence[str]) -> None:
        """As many failed checks; the first of them are printed."""
        for text in texts[:SHOWN]:
            self.bad(text)
        if len(texts) > SHOWN:
            self.problems += len(texts) - SHOWN
            print(f"  ...   and {len(texts) - SHOWN} more")

    def skip(self, text: str) -> None:
        """A check that was not made, and why."""
        self.unchecked.append(text)
        print(f"  --    not checked: {text}")


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
        check_numbers(self, model_max_length=(1, None))
        if self.fix_list and not self.data_path:
            raise ValueError("--fix_list needs --data_path: it lists the bad records of that file")
        if self.fix_list:
            check_outputs([self.fix_list], [self.data_path])


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
        bad = check_data(report, own, family)
        with user_errors():
            if own.fix_list:
                write_fix_list(own.fix_list, bad, is_whole=not report.unchecked)
    found = f"{report.problems} problems found" if report.problems else "no problem found"
    print(found + (", but not all was checked" if report.unchecked else ""))
    sys.exit(1 if report.problems else 0)


def check_installation(report: Report) -> None:
    """Versions, devices, and packages of the same name from elsewhere."""
    report.ok(", ".join(f"{name} {number}" for name, number in versions().items()))
    report.ok(f"commit {git_commit()}")
    report.ok(machine.describe())
    if line := machine.problem(machine.look()):
        report.bad(line)
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
        family = checkpoint.family
    except (ValueError, OSError) as error:
        report.bad(str(error))
        return None
    try:
        report.ok(f"{checkpoint.check_tensors():,} tensors, none missing, none left over")
    except (ValueError, OSError) as error:
        report.bad(str(error))
    report.ok(f"{family.name}: the processor fits the model, {tokens_of(family)}")
    for name, problem in selftest.run(family):
        report.bad(f"{name}: {problem}") if problem else report.ok(name)
    return family


def check_data(report: Report, own: DoctorSettings, family: Family | None) -> list[str]:
    """Every record: fields, tokens, length, pictures. Gives the ids of the bad ones ("record N" without an id)."""
    try:
        raw = read_json(own.data_path)
        if not raw:
            raise ValueError(f"{own.data_path}: the file holds no record")
    except (ValueError, OSError) as error:
        report.bad(str(error))
        report.skip("the records")
        return []
    store = open_store(report, own.image_folder)
    if family is None:
        report.skip("tokens, lengths, and what the model sees of a picture: no checkpoint to ask")
    ids = {name_of(own.data_path, number, one): id_of(one, number) for number, one in enumerate(raw, 1)}
    records, pairs, problems = read_all(ids, raw, family, store)
    problems += problems_of(within_length, pairs, own.model_max_length, "error")
    if store:
        problems += problems_of(check_pictures, records, store, family, "full")
    used = Counter(ids.values())
    problems += [f"{where}: the id is used {used[id]} times" for where, id in ids.items() if used[id] > 1]
    report.all_bad(problems)
    named = named_by(problems, set(ids))
    bad = [id for where, id in ids.items() if where in named]
    report.ok(f"{len(raw):,} records, {len(bad):,} of them bad")
    describe_all(report, records, pairs)
    return bad


def read_all(
    names: Iterable[str], raw: Sequence[Any], family: Family | None, store: ImageStore | None
) -> tuple[list[Prompt], list[Pair], list[str]]:
    """Records that are well-formed, the pairs among them tokenised where there is what it takes, and problems."""
    records, pairs, problems = [], [], []
    for where, one in zip(names, raw, strict=True):
        try:
            record = (parse_question if is_question(one) else parse_preference)(one, where)
            if family and isinstance(record, Preference) and (store or family.fixed):
                pairs.append(tokenize_one(record, family, store))
            records.append(record)
        except (ValueError, OSError) as error:
            problems.append(f"{where}: {error}")
    return records, pairs, problems


def tokens_of(family: Family) -> str:
    """What pictures cost, in words."""
    if family.fixed:
        return f"{family.num_image_tokens(None)} tokens per image"
    found = (f"{family.num_image_tokens(size):,} of {size[0]} x {size[1]} px" for size in EXAMPLES)
    return f"tokens per image: {', '.join(found)}"


def open_store(report: Report, folder: str | None) -> ImageStore | None:
    """The pictures, if they are there."""
    try:
        if folder:
            return ImageStore(folder)
    except (ValueError, OSError) as error:
        report.bad(str(error))
    report.skip("the pictures" + ("" if folder else ": no --image_folder"))
    return None


def describe_all(report: Report, records: Sequence[Prompt], pairs: Sequence[Pair]) -> None:
    """What the records are, and how long."""
    questions = [record for record in records if not isinstance(record, Preference)]
    preferences = [record for record in records if isinstance(record, Preference)]
    if questions:
        report.ok(f"questions of a test set: {dict(Counter(question.image_type for question in questions))}")
    if preferences:
        formats = dict(Counter(record.image_type for record in preferences))
        images = dict(sorted(Counter(len(record.images) for record in preferences).items()))
        report.ok(f"formats: {formats}, images: {images} (number in a prompt: pairs)")
    several, searches = sum(len(r.targets) > 1 for r in records), sum(r.is_search for r in records)
    if several or searches:
        report.ok(f"about several images: {several:,}; looking for what fits (`is_search`): {searches:,}")
    if pairs:
        report.ok(f"tokens of prompt and longer answer: {describe(pairs)['tokens']}")


def write_fix_list(path: Path, bad: Sequence[str], is_whole: bool) -> None:
    """Ids of the bad records. That there are none is only written where all was checked."""
    if bad or is_whole:
        write_text(path, json.dumps(bad, indent=1) + "\n")
        print(f"  ids of {len(bad)} bad records written to {path}" + ("" if is_whole else "; there may be more"))
    else:
        print(f"  {path} is not written: no bad record was found, but not all was checked")


def is_question(record: Any) -> bool:
    """Whether a record is of a test set: it has the true answer, and no pair of a better and a worse one."""
    return isinstance(record, dict) and "answer" in record and "chosen" not in record


def id_of(record: Any, number: int) -> str:
    """What a fix list calls a record."""
    return str(record["id"]) if isinstance(record, dict) and "id" in record else f"record {number}"


if __name__ == "__main__":
    main()
