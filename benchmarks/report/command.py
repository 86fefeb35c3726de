"""Write the results as one page, and put their tables into the READMEs.

    python -m benchmarks report
    python -m benchmarks report --results outputs/benchmarks/smoke.jsonl --output outputs/benchmarks/smoke

Without --results it writes of the project's own results: benchmarks/RESULTS.md, its pictures in benchmarks/results,
the tables between `<!-- results: NAME -->` and `<!-- /results -->` in the READMEs, and outputs/report/RESULTS.html.
"""

import argparse
from pathlib import Path

from .load import RESULTS, load_runs, stores
from .page import ROOT, html, markdown, old_readmes
from .summary import Summary, summarise


def main(arguments: list[str]) -> None:
    """Write the page; without a usable run nothing is written."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", nargs="+", type=Path, help="stores; by default the project's own")
    parser.add_argument("--step_times", nargs="+", type=Path, help="lines of `benchmarks speed --suite`")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "report", help="the folder of the HTML")
    options = parser.parse_args(arguments)
    summary = read(options.results, options.step_times)
    folder = options.output if options.results else RESULTS.parent
    files = pages(summary, folder, is_own=not options.results)
    files |= {} if options.results else old_readmes(summary)
    for path, text in [*files.items(), (options.output / "RESULTS.html", None)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html(files[folder / "RESULTS.md"], folder) if text is None else text, encoding="utf-8")
        print(path)


def read(results: list[Path] | None = None, step_times: list[Path] | None = None) -> Summary:
    """What the stores hold, the project's own ones by default."""
    return summarise(load_runs(results or stores(), step_times or sorted(RESULTS.glob("step_times*.jsonl"))))


def pages(summary: Summary, folder: Path, is_own: bool) -> dict[Path, str]:
    """RESULTS.md and its pictures, for a folder."""
    from . import plots

    pictures = {folder / "results" / f"{name}.svg": getattr(plots, name)(summary) for name in ("scores", "curves")}
    return pictures | {folder / "RESULTS.md": markdown(summary, is_own)}
