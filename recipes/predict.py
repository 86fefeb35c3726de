"""Answer new rows with what train.py trained: `peft-prompt-ext predict` as a script.

    python recipes/predict.py outputs/movie_reviews --text "A warm and funny film."
    python recipes/predict.py outputs/mood outputs/topic --file texts.jsonl

`python recipes/predict.py --help` lists the flags.
"""

import sys
from collections.abc import Sequence

from peft_prompt_ext_cli import main as command


def main(argv: Sequence[str] | None = None) -> None:
    """Answer the rows named by the arguments given, else by those of the process."""
    command(["predict", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
