"""Trains arms with seeds and controls on any model and data, answers the test questions, and compares:
`python -m scripts.study --config study.json --output DIR`

Every training and answering runs through its launch script, one after the other or --jobs at a time; with
--launcher "sbatch --wait" each is a job. Started again, a killed study goes on. Writes OUTPUT/results.md, results.json
and figures/. What a config holds is said in scripts/study/config.py; scripts/miniature/study.json is one.
"""

import logging
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.checkpoints import open_checkpoint
from llava.command_line import check_numbers, flag, parse
from llava.run_folder import only_writer
from llava.runtime import git_commit, setup_logging, short_commit, user_errors
from scripts.study.config import VARIANTS, located, read_config
from scripts.study.report import SEVERAL, write_report
from scripts.study.results import collect
from scripts.study.running import Runner, commits, progress, refuse_others
from scripts.study.units import Unit, plan

logger = logging.getLogger("scripts.study")


@dataclass(frozen=True)
class StudyFlags:
    """The command line."""

    _argument_group_name = "study"
    config: Path = flag("what is compared, a JSON file")
    output: Path = flag("folder of the study, an old one to go on with")
    only: list[str] = flag("these arms alone, and the base", [])
    confirm: bool = flag("with the changes of the entry `confirm`: fresh seeds and questions for chosen arms", False)
    quick: bool = flag("with the changes that the config's entry `quick` makes, to see that everything works", False)
    jobs: int = flag("units at a time", 1)
    launcher: str = flag('what starts a script: bash, or for example "sbatch --wait --partition=NAME"', "bash")
    report_only: bool = flag("run nothing: report what is there", False)


def main(argv: Sequence[str] | None = None) -> None:
    """Checks, runs what is missing, reports."""
    setup_logging()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that children end too
    with user_errors():
        (flags,) = parse([StudyFlags], __doc__, argv)
        check_numbers(flags, jobs=(1, 1000))
        config = read_config(flags.config, [name for name in VARIANTS if getattr(flags, name)], flags.only)
        output = flags.output.resolve()
        units = plan(config, open_checkpoint(located(config.base)).digest)
        if not flags.report_only:
            check(output, units)
            with only_writer(output / "study") as lock:
                Runner(output, flags.jobs, shlex.split(flags.launcher), lock).run(units)
        logger.info("%s\n%s", write_report(collect(config, output, units), output), output / "results.md")


def check(output: Path, units: Sequence[Unit]) -> None:
    """Refuses units of another configuration, and says how far the study is. Raises ValueError."""
    refuse_others(output, units)
    here = git_commit()
    others = [commit for commit in commits(output, units) if commit != here]
    if others:
        logger.warning("finished units are of other code (%s). %s", ", ".join(map(short_commit, others)), SEVERAL)
    logger.info("%s", progress(output, units))


if __name__ == "__main__":
    main()
