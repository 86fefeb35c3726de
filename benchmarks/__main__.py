"""Command line: `python -m benchmarks speed --help`."""

import logging
import sys
from importlib import import_module

from .harness.store import StoreError
from .harness.suite import SuiteError


COMMANDS = {
    "run": "the grids of suites: methods, inits, tasks, precisions, seeds; goes on where it was stopped",
    "report": "the results as one page, RESULTS.md and HTML, and the tables of the READMEs",
    "recommend": "which method to take, given memory, storage and the least score",
    "speed": "time and memory of a training step: PEFT, this plugin, LoRA, full fine-tuning; mixed-task batches",
    "gpu": "what only a GPU can show, in minutes: the engine's tests, attention, steps on 1B and 8B Llamas",
}
MODULES = {"report": "report.command", "gpu": "gpu.command"}


def main(arguments: list[str]) -> None:
    """Run a command; what it needs is imported by it. A wrong suite or store ends it with one line."""
    name = arguments[0] if arguments else "--help"
    if name not in COMMANDS:
        lines = [f"  {command}  {text}" for command, text in COMMANDS.items()]
        print("\n".join(["usage: python -m benchmarks COMMAND [--help]", "", *lines]))
        raise SystemExit(0 if name in {"-h", "--help"} else 2)
    try:
        import_module(f"benchmarks.{MODULES.get(name, name)}").main(arguments[1:])
    except (StoreError, SuiteError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    if sys.argv[1:2] == ["recommend"]:  # an answer in ten lines
        logging.disable(logging.WARNING)
    main(sys.argv[1:])
