"""The command `peft-prompt-ext`: train, predict, memory, assets, texts and export.

Nothing here imports torch before a command runs, so that help is instant; see `peft_prompt_ext_cli`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import assets
from ._choices import nearest


COMMANDS = {
    "train": "train and score a task: a named one, or your own CSV, JSON or JSONL file",
    "predict": "answer new rows with what was trained",
    "memory": "what training a model needs, in bytes, from its config alone",
    "assets": "fetch the embedded models and data, and print where they are",
    "texts": "the texts that a prompt behind them has kept on disk: where, how much; --clear deletes them",
    "export": "trained prompts as a plain checkpoint, which answers without PEFT and without this package",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: The command's name and its arguments, else those of the process.

    Raises:
        SystemExit: There is no such command, or it failed; the message is one line.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in {"-h", "--help"}:
        lines = (f"  {name:<10}{text}" for name, text in COMMANDS.items())
        sys.stdout.write("usage: peft-prompt-ext COMMAND ...; --help after a command lists its flags\n\n")
        sys.stdout.write("\n".join(lines) + "\n")
        return
    if argv[0] not in COMMANDS:
        raise SystemExit(
            f"error: There is no command {argv[0]!r}{nearest(argv[0], COMMANDS)}. The commands are: "
            f"{', '.join(COMMANDS)}."
        )
    functions = {"train": train, "predict": predict, "memory": memory, "assets": assets.main, "texts": texts}
    run = {**functions, "export": export}[argv[0]]
    try:
        run(argv[1:])
    except (ValueError, ImportError, OSError, assets.AssetError) as error:
        if os.environ.get("PEFT_PROMPT_EXT_DEBUG", "") not in {"", "0"}:
            raise
        raise SystemExit(f"error: {error}") from None


def train(argv: list[str]) -> dict[str, float]:
    """Train and score a task. Returns what all_results.json holds."""
    if not argv or {"-h", "--help"} & set(argv):
        from .training.help import train_help

        sys.stdout.write(train_help() + "\n")
        return {}
    from .training.run import parse, run

    return run(*parse(argv))


def predict(argv: list[str]) -> None:
    """Answer new rows."""
    options = predict_parser().parse_args(argv)
    from .training.answers import answer

    answer(options)


def memory(argv: list[str]) -> None:
    """Print what each way of training a model needs."""
    options = memory_parser().parse_args(argv)
    from .memory import show

    show(options)


def texts(argv: list[str]) -> None:
    """Print what texts are kept on disk, or delete them."""
    parser = argparse.ArgumentParser(prog="peft-prompt-ext texts", description=texts.__doc__)
    parser.add_argument("--folder", help="the text_cache_dir of a config; by default the one in the user's cache")
    parser.add_argument("--clear", action="store_true", help="delete them")
    options = parser.parse_args(argv)
    from .shared_prefix.text_folder import clear_text_cache, default_root, list_files

    files, root = list(list_files(options.folder)), options.folder or default_root()
    size = sum(path.stat().st_size for path in files)
    freed = clear_text_cache(options.folder) if options.clear else 0
    sys.stdout.write(f"{root}: {len(files)} texts, {size / 1e6:.1f} MB{', deleted' if freed else ''}\n")


def export(argv: list[str]) -> None:
    """Export trained prompts, and print what was proved."""
    options = vars(export_parser().parse_args(argv))
    from .export import export as write

    report = write(**options)
    for name, proof in report["prompts"].items():
        difference = proof["largest_difference_of_log_probabilities"]
        sys.stdout.write(
            f"{name}: {proof['texts']} texts answered as by PEFT, log-probabilities within {difference:.1e}\n"
        )
    sys.stdout.write(f"{options['output_dir']}: its README.md says what a client sends\n")


def export_parser() -> argparse.ArgumentParser:
    """The flags of `export`."""
    parser = argparse.ArgumentParser(
        prog="peft-prompt-ext export",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write trained prompts as tokens of a plain checkpoint, and prove that it answers as PEFT does.",
        epilog="""examples:
  peft-prompt-ext export outputs/movies --format checkpoint --output_dir served
  peft-prompt-ext export outputs/sst2 nli=outputs/rte --format checkpoint --output_dir served --texts texts.txt""",
    )
    parser.add_argument(
        "adapters", metavar="adapter", nargs="+", help="adapter folders or Hub ids of one base model, or NAME=FOLDER"
    )
    parser.add_argument("--format", default="checkpoint", help="checkpoint (default: %(default)s)")
    parser.add_argument("--output_dir", required=True, help="the folder to write; it must not exist")
    parser.add_argument(
        "--texts", help="a file with a text (or a JSON object with a task's columns) a line to prove it on"
    )
    parser.add_argument("--base_model", help="the base model, if it is not the one that the adapters name")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: %(default)s)")
    return parser


def predict_parser() -> argparse.ArgumentParser:
    """The flags of `predict`."""
    parser = argparse.ArgumentParser(
        prog="peft-prompt-ext predict",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Answer new rows with what `peft-prompt-ext train` trained: a label and its probability.",
        epilog="""examples:
  peft-prompt-ext predict outputs/movies --text "A warm and funny film."
  peft-prompt-ext predict outputs/rte --file pairs.jsonl > answers.jsonl
  cat reviews.txt | peft-prompt-ext predict outputs/movies
  peft-prompt-ext predict outputs/mood outputs/topic --file texts.jsonl

A file has the task's columns. Lines of standard input are JSON objects, or texts if the task has one column of text;
each line has an answer, an empty one too. Into a file or a pipe the answers are written as JSON lines.
Several folders of one base model (--prompt_position suffix) read each text once; a line has an answer by folder.""",
    )
    parser.add_argument(
        "folders",
        metavar="folder",
        nargs="+",
        help="the output folder of a run, or the Hub id that it was pushed to; several if their texts are the same",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", nargs="+", help="texts, or JSON objects with the task's columns")
    source.add_argument("--file", help="a CSV, JSON or JSONL file with the task's columns")
    parser.add_argument("--batch_size", type=int, default=32, help="rows at a time (default: %(default)s)")
    parser.add_argument("--device", help="where to run, if not quantised; by default a GPU if there is one")
    return parser


def memory_parser() -> argparse.ArgumentParser:
    """The flags of `memory`."""
    parser = argparse.ArgumentParser(
        prog="peft-prompt-ext memory",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="What each way of training a causal language model needs, in bytes. Only its config is read.",
        epilog="""examples:
  peft-prompt-ext memory smollm2-135m --card 8GB --batch 16 --tokens 256
  peft-prompt-ext memory smollm2-135m --tokens 256 --text_rows 5000 --text_cache_bytes 16GB""",
    )
    parser.add_argument("model", help="an embedded default, a folder or a Hub name")
    parser.add_argument("--card", type=to_bytes, metavar="SIZE", help="memory of the device, such as 8GB")
    parser.add_argument("--batch", type=int, default=8, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="text tokens of a row (default: %(default)s)")
    parser.add_argument("--num_virtual_tokens", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--labels_per_row", type=int, default=1, help="tokens of its answer (default: %(default)s)")
    rows = "rows whose texts are kept, if prompts stand behind them (default: %(default)s)"
    parser.add_argument("--text_rows", type=int, default=0, help=rows)
    most = "the most bytes of kept texts, such as 16GB; by default all are kept"
    parser.add_argument("--text_cache_bytes", type=to_bytes, metavar="SIZE", help=most)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations")
    return parser


def to_bytes(text: str) -> int:
    """A size such as 8GB, from a command line."""
    from .memory import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    main()
