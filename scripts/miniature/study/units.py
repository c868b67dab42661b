"""What is run: units, each a folder with its commands and the units it is made from, planned from the config alone.

Commands are words behind `python`. They name folders below the study's as {output}/NAME, so that a study may be moved.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from scripts.miniature.study.config import Arm, Config, PairSet

OUTPUT = "{output}"
OWN = "{own}"  # the unit's own folder
IMAGES = "{output}/data/images"
TEST, VALIDATION = "{output}/data/test.json", "{output}/data/validation_questions.json"
FRESH = "{output}/fresh/test.json"
HEADS = "{output}/heads/heads.json"
KINDS = ("data", "sources", "pairs", "heads", "train", "validate", "tune", "test")
PLAIN, ADAPTVIZ, TUNED = "plain", "adaptviz", "adaptviz_tuned"  # how a test set was answered
READ = {"image_folder": IMAGES, "check_images": "exists"}
KEEP_ALL = {  # thresholds that no attention ratio exceeds
    "sequence": {n: 1 for n in (2, 3, 4, 5)}, "collage": {n: 1 for n in (2, 3, 4, 6, 9)}, "pip": {2: 1},
}  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """One folder of the study."""

    name: str  # the folder, below the study's
    kind: str  # one of KINDS
    commands: tuple[tuple[str, ...], ...]
    inputs: tuple[str, ...] = ()  # names of units that must be finished before
    identity: Mapping[str, Any] = field(default_factory=dict, compare=False)  # what decides its content

    def words(self, output: Path) -> list[list[str]]:
        """The commands with the folders filled in."""
        own = str(output / self.name)
        return [[word.replace(OWN, own).replace(OUTPUT, str(output)) for word in words] for words in self.commands]


def plan(config: Config, rates: Mapping[str, float | None], base_digest: str) -> list[Unit]:
    """All units that can be named, inputs first. `rates`: the learning rate of each arm, None while it is not chosen.

    An arm without a rate gets its grid: one training and its validation answers for every learning rate.
    """
    units: dict[str, Unit] = {}
    for unit in [data(config), *_of_arms(config, rates)]:
        units.setdefault(unit.name, unit)
    return _identified(units.values(), base_digest)


def all_units(config: Config, rates: Mapping[str, float | None], base_digest: str) -> list[Unit]:
    """As `plan`, the first rate of the grid standing for every one that is not chosen: the count is the same."""
    return plan(config, {name: rate or config.learning_rates[0] for name, rate in rates.items()}, base_digest)


def _of_arms(config: Config, rates: Mapping[str, float | None]) -> Iterable[Unit]:
    wanted = [arm for arm in config.arms.values() if arm.seeds]
    for arm in wanted:
        yield from pairs(config, arm.pairs) if arm.pairs else ()
        if uses_heads(arm):
            yield heads(config)
    for arm in {config.root(arm).name: config.root(arm) for arm in wanted if arm.pairs}.values():
        yield from pairs(config, arm.pairs)
        for rate in config.learning_rates:
            yield from (train(config, arm, rate, config.seeds[0]), validate(config, arm, rate))
    for arm in wanted:
        rate = rates.get(config.root(arm).name)
        if arm.pairs is None or rate is not None:
            yield from _with_rate(config, arm, rate)


def _with_rate(config: Config, arm: Arm, rate: float | None) -> Iterable[Unit]:
    if arm.adaptviz and config.tune is not None:
        if arm.pairs:
            yield train(config, arm, rate, arm.seeds[0])
        yield tune(config, arm, rate)
    for seed in arm.seeds:
        if arm.pairs:
            yield train(config, arm, rate, seed)
        if not arm.same_as:
            yield test(config, arm, rate, seed)
    for seed in confirm_seeds(config, arm):
        if arm.pairs:
            yield train(config, arm, rate, seed)
        yield from (fresh(config), confirm(config, arm, rate, seed))


def uses_heads(arm: Arm) -> bool:
    """Whether the arm's flags name the discovered heads."""
    return "{heads}" in arm.flags.values()


def data(config: Config) -> Unit:
    """Pictures, pairs with random rejected answers, instructions, validation and test questions."""
    sizes = config.data
    flags = {
        "num_train": sizes["num_pairs"], "num_validation": 1, "num_test": sizes["num_test"], "rejected": "random",
        "num_instructions": sizes["num_instructions"], "num_single": sizes["num_single"],
        "num_validation_questions": sizes["num_validation"], "seed": sizes["seed"],
    }  # fmt: skip
    return Unit("data", "data", (command(config.make_data, output=OWN, **flags),))


def pairs(config: Config, name: str) -> list[Unit]:
    """The pairs of a source, and of these the set that an arm trains on."""
    wanted: PairSet = config.pair_sets[name]
    flags = {"num_pairs": config.data["num_pairs"], "seed": config.data["seed"]}
    if wanted.single:
        flags |= {"single": "{output}/data/single.json", "num_single": config.data["num_single"]}
    changed = ("--shuffle_targets",) if wanted.shuffle_targets else ()
    source = "data/train.json" if wanted.source == "random" else f"sources/{wanted.source}/pairs.json"
    words = command("scripts.miniature.study.pairs", pairs=f"{{output}}/{source}", output=OWN, **flags)
    made = [] if wanted.source == "random" else [selection(config, wanted.source)]
    return [*made, Unit(f"pairs/{name}", "pairs", ((*words, *changed),), ("data", *(unit.name for unit in made)))]


def selection(config: Config, source: str) -> Unit:
    """Pairs by data_gen: what is true of another image, the base's wrong answers, or those of them it selects.

    Or without any true answer: what the base answers when AdaptViz steers it to the image asked about is chosen.
    """
    if source == "steered":
        return steered(config)
    flags = {"instructions": "{output}/data/instructions.json", "output": OWN, "image_folder": IMAGES}
    if source == "other_image":
        flags |= {"rejected": "other_image", "seed": config.data["seed"]}
    else:
        flags |= {"model_name_or_path": config.base, "check_images": "exists", **config.selection}
    if source == "own_mistakes":
        flags |= {"thresholds": json.dumps(KEEP_ALL), "min_perplexity": 0}
    return Unit(f"sources/{source}", "sources", (command("data_gen.gen_chosen_rejected", **flags),), ("data",))


def steered(config: Config) -> Unit:
    """Pairs of the base's steered answers, over the same prompts as those of the other sources."""
    asked = f"{OWN}/asked"
    flags = {"model_name_or_path": config.base, "data_path": f"{asked}/train.json", **READ, **config.answering}
    commands = (
        command("scripts.miniature.study.pairs", pairs="{output}/data/instructions.json", output=asked,
                num_pairs=config.data["num_pairs"]),
        command("inference.llava_hound_dpo.run_inference", **flags, output=f"{OWN}/{PLAIN}.jsonl"),
        command("inference_optimization.llava_hound_dpo.run_adaptive", **flags, output=f"{OWN}/{ADAPTVIZ}.jsonl"),
        command("scripts.miniature.study.steered", instructions=f"{asked}/train.json", plain=f"{OWN}/{PLAIN}.jsonl",
                steered=f"{OWN}/{ADAPTVIZ}.jsonl", output=OWN, seed=config.data["seed"]),
    )  # fmt: skip
    return Unit("sources/steered", "sources", commands, ("data",))


def heads(config: Config) -> Unit:
    """The base's heads, ranked by how well they pick the image asked about, on validation questions."""
    flags = {"model_name_or_path": config.base, "data_path": VALIDATION, "output": HEADS, **READ, **config.heads}
    return Unit("heads", "heads", (command("scripts.discover_heads", **flags),), ("data",))


def train_name(arm: Arm, rate: float, seed: int) -> str:
    """Folder of a trained model."""
    return f"train/{arm.name}/{rate:g}/seed_{seed}"


def model_of(config: Config, arm: Arm, rate: float | None, seed: int) -> tuple[str, tuple[str, ...]]:
    """The checkpoint that answers for the arm, and the units it needs."""
    if arm.pairs is None:
        return config.base, ("data",)
    name = train_name(arm, rate, seed)
    return f"{{output}}/{name}/adapter", (name, "data")


def train(config: Config, arm: Arm, rate: float, seed: int) -> Unit:
    """One run of run_dpo in one process; the same global batch and number of steps for every arm."""
    flags = {
        "model_name_or_path": config.base, "data_path": f"{{output}}/pairs/{arm.pairs}/train.json", **READ,
        "output_dir": f"{OWN}/adapter", "max_steps": config.steps, "per_device_train_batch_size": config.batch,
        "save_steps": max(1, config.steps // 4), "save_total_limit": 1, "report_to": "none",
        **config.training, **arm.flags, "learning_rate": rate, "seed": seed,
    }  # fmt: skip
    flags = {name: HEADS if value == "{heads}" else value for name, value in flags.items()}
    needs = (f"pairs/{arm.pairs}", "data", *(("heads",) if uses_heads(arm) else ()))
    return Unit(train_name(arm, rate, seed), "train", (command("train.llava_hound_dpo.run_dpo", **flags),), needs)


def validate(config: Config, arm: Arm, rate: float) -> Unit:
    """Scores of one rate of the grid on validation questions."""
    model, needs = model_of(config, arm, rate, config.seeds[0])
    answers = f"{OWN}/{PLAIN}.jsonl"
    flags = {"model_name_or_path": model, "data_path": VALIDATION, "output": answers, **READ, **config.answering}
    commands = command("inference.llava_hound_dpo.run_inference", **flags), _evaluate([answers], VALIDATION)
    return Unit(f"validate/{arm.name}/{rate:g}", "validate", commands, needs)


def tune_name(arm: Arm) -> str:
    """Folder of the AdaptViz settings chosen for the arm."""
    return f"tune/{arm.name}"


def tune(config: Config, arm: Arm, rate: float | None) -> Unit:
    """AdaptViz's settings for the arm, chosen on validation questions with its first seed."""
    model, needs = model_of(config, arm, rate, arm.seeds[0])
    flags = {"model_name_or_path": model, "data_path": VALIDATION, "output": OWN, **READ}
    flags |= {**config.answering, **config.tune}
    return Unit(tune_name(arm), "tune", (command("inference_optimization.llava_hound_dpo.tune", **flags),), needs)


def test_name(arm: Arm, seed: int) -> str:
    """Folder of the test answers of an arm and seed."""
    return f"test/{arm.name}/seed_{seed}"


def test(config: Config, arm: Arm, rate: float | None, seed: int) -> Unit:
    """Answers to the test set and their scores: plain, and with AdaptViz where the arm has it."""
    model, needs = model_of(config, arm, rate, seed)
    flags = {"model_name_or_path": model, "data_path": TEST, **READ, **config.answering}
    adaptive = partial(command, "inference_optimization.llava_hound_dpo.run_adaptive", **flags)
    found = {PLAIN: command("inference.llava_hound_dpo.run_inference", **flags, output=f"{OWN}/{PLAIN}.jsonl")}
    if arm.adaptviz:
        found[ADAPTVIZ] = adaptive(output=f"{OWN}/{ADAPTVIZ}.jsonl")
    if arm.adaptviz and config.tune is not None:
        settings = f"{{output}}/{tune_name(arm)}/tuned.json"
        found[TUNED] = adaptive(output=f"{OWN}/{TUNED}.jsonl", config=settings)
        needs = (*needs, tune_name(arm))
    scores = _evaluate([f"{OWN}/{name}.jsonl" for name in found], TEST)
    return Unit(test_name(arm, seed), "test", (*found.values(), scores), needs)


def confirm_seeds(config: Config, arm: Arm) -> tuple[int, ...]:
    """The fresh seeds of an arm that is to be confirmed; the base's own, which is not trained."""
    if not arm.confirm:
        return ()
    return tuple(config.confirm["seeds"]) if arm.pairs else arm.seeds


def fresh(config: Config) -> Unit:
    """Test questions on which nothing was chosen."""
    flags = {"output": OWN, "num_train": 0, "num_validation": 0, "num_test": config.confirm["num_test"]}
    return Unit("fresh", "data", (command(config.make_data, **flags, seed=config.confirm["data_seed"]),))


def confirm_name(arm: Arm, seed: int) -> str:
    """Folder of the answers to the fresh questions of an arm and seed."""
    return f"confirm/{arm.name}/seed_{seed}"


def confirm(config: Config, arm: Arm, rate: float | None, seed: int) -> Unit:
    """Plain answers to the fresh questions and their scores."""
    model, needs = model_of(config, arm, rate, seed)
    answers = f"{OWN}/{PLAIN}.jsonl"
    flags = {"model_name_or_path": model, "data_path": FRESH, **READ, "image_folder": "{output}/fresh/images"}
    words = command("inference.llava_hound_dpo.run_inference", **flags, **config.answering, output=answers)
    return Unit(confirm_name(arm, seed), "test", (words, _evaluate([answers], FRESH)), (*needs, "fresh"))


def _evaluate(answers: Sequence[str], questions: str) -> tuple[str, ...]:
    words = command("inference.llava_hound_dpo.evaluate", questions=questions, output=OWN, samples=0)
    return (*words, "--answers", *answers)


def command(module: str, **flags: Any) -> tuple[str, ...]:
    """Words behind `python`; a list becomes several words."""
    words = ["-m", module]
    for name, value in flags.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
    return tuple(words)


def _identified(units: Iterable[Unit], base_digest: str) -> list[Unit]:
    """The units with what decides their content: commands, the base's weights, and the same of their inputs."""
    found: dict[str, Unit] = {}
    for unit in units:
        inputs = {name: digest(found[name]) for name in unit.inputs}
        identity = {"commands": [list(words) for words in unit.commands], "inputs": inputs, "base": base_digest}
        found[unit.name] = Unit(unit.name, unit.kind, unit.commands, unit.inputs, identity)
    return list(found.values())


def digest(unit: Unit) -> str:
    """Of a unit's identity."""
    return hashlib.sha256(json.dumps(unit.identity, sort_keys=True).encode()).hexdigest()[:16]
