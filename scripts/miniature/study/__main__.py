"""The whole experiment on the miniature world, with controls: `python -m scripts.miniature.study --output DIR`.

Makes data, trains every arm with several seeds at a learning rate chosen on validation questions, answers the test
questions once with each model, with and without AdaptViz, and writes OUTPUT/results.json, results.md, report.html and
figures/. All work is done by the entry points that a real model uses. Started again, a killed study goes on.
"""

import argparse
import dataclasses
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.checkpoints import weight_digest
from llava.runtime import ArgumentParser, git_commit, setup_logging, short_commit, stop, user_errors
from scripts.miniature.study.config import Config, read_config
from scripts.miniature.study.report import write_report
from scripts.miniature.study.results import choose_rates, collect, commits
from scripts.miniature.study.running import ROOT, Runner, UnitFailed, budget, lock, refuse_others
from scripts.miniature.study.tables import SEVERAL
from scripts.miniature.study.units import Unit, all_units, plan

logger = logging.getLogger("scripts.miniature.study")

CONFIG = Path("scripts/miniature/study.json")


def main(argv: Sequence[str] | None = None) -> None:
    """Checks, says what it costs, runs what is missing, reports."""
    args = parse_args(argv)
    setup_logging()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that children end too
    with user_errors():
        config = chosen(read_config(args.config, args.quick), args.only)
        study = Study(config, args.output.resolve(), weight_digest(str(ROOT / config.base)))
        if not args.report_only:
            study.check()
    if not (args.report_only or args.plan_only):
        study.run(args.jobs)
    if not args.plan_only:
        study.report()


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(
        "python -m scripts.miniature.study", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--config", type=Path, default=ROOT / CONFIG, help=f"the study (default: {CONFIG})")
    add("--output", type=Path, required=True, help="folder of the study, an old one to go on with")
    add("--quick", action="store_true", help="sizes of some minutes, to see that everything works")
    add("--only", nargs="+", metavar="ARM", default=[],
        help="these arms or groups of arms, and the base (an arm that varies another also needs the other's\n"
        "learning rates)")  # fmt: skip
    add("--jobs", type=int, default=1, help="units at a time, a core each")
    add("--plan_only", action="store_true", help="say what would be run and how long it takes")
    add("--report_only", action="store_true", help="run nothing: report what is there")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error("--jobs must be 1 or more")
    return args


def chosen(config: Config, only: Sequence[str]) -> Config:
    """The study with no seeds for arms that are not asked for. Raises ValueError for an unknown arm or group."""
    groups = list(dict.fromkeys(arm.group for arm in config.arms.values()))
    unknown = [name for name in only if name not in (*config.arms, *groups)]
    if unknown:
        raise ValueError(
            f"--only {unknown[0]}: no such arm or group; arms: {', '.join(config.arms)}; groups: {', '.join(groups)}"
        )
    kept = {name for name, arm in config.arms.items() if not only or name in (*only, "base") or arm.group in only}
    arms = {name: arm if name in kept else dataclasses.replace(arm, seeds=()) for name, arm in config.arms.items()}
    return dataclasses.replace(config, arms=arms)


@dataclasses.dataclass(frozen=True)
class Study:
    """A config and the folder of its units."""

    config: Config
    output: Path
    base_digest: str

    def everything(self) -> list[Unit]:
        """All units, whether or not their learning rates are chosen."""
        return all_units(self.config, choose_rates(self.config, self.output), self.base_digest)

    def known(self) -> list[Unit]:
        """The units that can be run so far."""
        return plan(self.config, choose_rates(self.config, self.output), self.base_digest)

    def check(self) -> None:
        """Refuses units of another configuration, says what is left out and what the rest costs. Raises ValueError."""
        refuse_others(self.output, self.known())
        for name, reason in self.config.left_out.items():
            logger.info("left out: %s (%s)", name, reason)
        everything, here = self.everything(), git_commit()
        others = [commit for commit in commits(self.output, everything) if commit != here]
        if others:
            logger.warning("finished units are of other code (%s). %s", ", ".join(map(short_commit, others)), SEVERAL)
        logger.info("%s", budget(self.output, everything, self.config.seconds))

    def run(self, jobs: int) -> None:
        """What is missing: first that by which learning rates are chosen, then, at these, all arms."""
        with user_errors():
            held = lock(self.output)
        with held:
            runner = Runner(self.output, jobs, self.everything(), self.config.seconds, held)
            try:
                runner.run(self.known())
                runner.everything = self.everything()
                with user_errors():
                    refuse_others(self.output, self.known())
                rates = choose_rates(self.config, self.output)
                logger.info("learning rates: %s", ", ".join(f"{name} {rate:g}" for name, rate in rates.items()))
                runner.run(self.known())
            except UnitFailed as error:
                stop(f"{error}. Start the same command again to go on.")

    def report(self) -> None:
        """Writes the results of what is finished, and logs the tables."""
        with user_errors():
            results = collect(self.config, self.output, self.everything())
        write_report(results, self.output)
        logger.info("%s", (self.output / "results.md").read_text(encoding="utf-8"))
        logger.info("%s", self.output / "report.html")


if __name__ == "__main__":
    sys.exit(main())
