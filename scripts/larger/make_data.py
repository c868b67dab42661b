"""Data sets of the larger world: `python -m scripts.larger.make_data --output DIR --seed 0`.

The same files, fields and flags as scripts.miniature.make_data: preference pairs, test questions in three multi-image
formats and about single images, and on demand what the study asks for. Training and validation show the glyphs of one
drawing style, the test shows other glyphs of another.
"""

from pathlib import Path

from llava.runtime import user_errors
from scripts.larger.fetch import PARTS
from scripts.larger.prompts import sampler
from scripts.larger.world import read_emoji
from scripts.miniature.make_data import parser_of, write


def main() -> None:
    """Writes the files of one data set."""
    parser = parser_of(__doc__)
    parser.add_argument("--parts", type=Path, default=PARTS, help=f"what fetch has extracted (default: {PARTS})")
    args = parser.parse_args()
    with user_errors():
        emoji = read_emoji(args.parts / "emoji")
    write(args, sampler(emoji))


if __name__ == "__main__":
    main()
