"""Answer a multi-image test set with AdaptViz: `python -m inference_optimization.llava_hound_dpo.run_adaptive --help`.

As plain inference (inference/llava_hound_dpo/run_inference.py), and the same answers file, but the attention of the
last prompt token on image tokens is scaled, by a factor that depends on how sure the model is of its first token.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from inference_optimization.llava_hound_dpo.adaptviz import (
    DEFAULTS,
    PRESETS,
    SCOPES,
    STEPS,
    AdaptViz,
    Bands,
    add_place_arguments,
    place_of,
    read_config,
)
from llava.answering import Job, add_arguments, generated, identify, prepare, run
from llava.runtime import ArgumentParser, leave, setup_logging, user_errors
from llava.scaling import RULES

THRESHOLDS = {"confidence_threshold_low": "low", "confidence_threshold_high": "high"}
FACTORS = ("alpha_low", "alpha_middle", "alpha_high")


def main() -> None:
    """Check, answer what is not answered yet, merge."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_arguments(parser)
    add_adaptviz_arguments(parser)
    args = parser.parse_args()
    setup_logging()
    with user_errors():
        job = prepare(args)
        adaptviz = settings_of(args, job)
        adaptviz.check(job.questions, job.num_layers, job.num_heads)
        identity = identify(args, job) | {"adaptviz": adaptviz.to_dict()}
    run(args, job, identity, args.output, generated(args, job, adaptviz.steer))
    leave()


def add_adaptviz_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the rule."""
    group = parser.add_argument_group("AdaptViz", "not given: from --config, else --preset, else the scope's default")
    add = group.add_argument
    add("--config", type=Path, help="settings written by ...llava_hound_dpo.tune")
    add("--preset", choices=sorted(PRESETS), help="a published single-image setting (scope all)")
    add("--scope", choices=SCOPES, help="target: the tokens of the image asked about (default); all: every image's;\n"
        "balance: the target's, the attention on all images together kept")  # fmt: skip
    add("--rule", choices=RULES, help="multiply: score times factor (the paper); add: also raises negative scores")
    add("--steps", choices=STEPS, help="prefill: the last prompt token (the paper); all: every decoding step too")
    add_place_arguments(group)
    add("--alpha", type=float, help="one factor whatever the confidence (ScalingVis)")
    add("--confidence_threshold_low", type=float, help="below it: alpha_low")
    add("--confidence_threshold_high", type=float, help="from it on: alpha_high; between the two: alpha_middle")
    for name in FACTORS:
        add(f"--{name}", type=float, help="factor of that band; 1 changes nothing")


def settings_of(args: argparse.Namespace, job: Job) -> AdaptViz:
    """What the flags say. Raises ValueError."""
    if args.config and args.preset:
        raise ValueError("--config and --preset both choose the settings: give one of them")
    changed = {name: value for flag, name in THRESHOLDS.items() if (value := getattr(args, flag)) is not None}
    changed |= {name: value for name in FACTORS if (value := getattr(args, name)) is not None}
    if args.alpha is not None and changed:
        raise ValueError("--alpha is one factor for every confidence: thresholds and band factors do not go with it")
    if args.config:
        settings = read_config(args.config)
    elif args.preset:
        settings = AdaptViz(scope="all", bands=PRESETS[args.preset])
    else:
        settings = AdaptViz(scope=args.scope or "target", bands=DEFAULTS[args.scope or "target"])
    names = {name: value for name in ("scope", "rule", "steps") if (value := getattr(args, name)) is not None}
    names |= place_of(args, job)
    if args.alpha is not None:
        names |= {"bands": Bands.fixed(args.alpha), "by_format": {}}
    elif changed:
        names |= {"bands": dataclasses.replace(settings.bands, **changed), "by_format": {}}
    return dataclasses.replace(settings, **names)


if __name__ == "__main__":
    sys.exit(main())
