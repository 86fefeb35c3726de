"""Train and score one task, by prompt tuning or another method: `peft-prompt-ext train` as a script.

    python recipes/train.py --task_name sst2 --output_dir outputs/sst2
    accelerate launch --num_processes 2 recipes/train.py --task_name rte --data_dir glue/rte --output_dir outputs/rte

`python recipes/train.py --help` lists the flags.
"""

import sys
from collections.abc import Sequence

from peft_prompt_ext_cli import main as command


def main(argv: Sequence[str] | None = None) -> None:
    """Run the recipe with the arguments given, else those of the process."""
    command(["train", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
