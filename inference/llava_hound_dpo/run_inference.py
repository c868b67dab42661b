"""Answer a multi-image test set: `python -m inference.llava_hound_dpo.run_inference --help`, or by torchrun.

Every answer comes with its attention ratio and confidence, and is on disk as soon as it is finished.
"""

import argparse
import sys

from llava.answering import add_arguments, generated, identify, prepare, run
from llava.runtime import ArgumentParser, leave, setup_logging, user_errors


def main() -> None:
    """Check, answer what is not answered yet, merge."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    setup_logging()
    with user_errors():
        job = prepare(args)
        identity = identify(args, job)
    run(args, job, identity, args.output, generated(args, job))
    leave()


if __name__ == "__main__":
    sys.exit(main())
