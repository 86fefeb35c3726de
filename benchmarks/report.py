"""One HTML file and the same numbers in Markdown, from the results of `python -m benchmarks run`.

    python -m benchmarks report
    python -m benchmarks report --results outputs/benchmarks/smoke.jsonl --output outputs/benchmarks/smoke

The same results give the same bytes. The HTML opens from the disk: pictures are in it, nothing is fetched.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .harness.store import StoreError


RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str]) -> None:
    """Write `report.html` and `report.md`; without a usable run nothing is written."""
    options = _options(arguments)
    from .reporting.evidence import read_evidence
    from .reporting.render import build_report
    from .reporting.runs import EvidenceError
    from .reporting.sections.engine import read_speed

    try:
        evidence = read_evidence(options.results or default_results())
        speed = read_speed(default_speed() if options.speed is None else options.speed)
        report = build_report(evidence, speed, _wanted(options.suite, options.results or default_results()))
    except (StoreError, EvidenceError) as error:
        raise SystemExit(f"error: {error}") from None
    options.output.mkdir(parents=True, exist_ok=True)
    for name, text in (("report.html", report.html), ("report.md", report.markdown)):
        path = options.output / name
        path.write_text(text, encoding="utf-8")
        print(path)


def default_results() -> list[Path]:
    """The project's own stores: the files of `RESULTS` whose lines are events."""
    return [path for path in sorted(RESULTS.glob("*.jsonl")) if '"schema_version"' in _first_line(path)]


def default_speed() -> list[Path]:
    """The project's own speed measurements."""
    return sorted(RESULTS.glob("speed_*.jsonl"))


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline()


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", nargs="+", type=Path, help="stores; by default those in benchmarks/results")
    parser.add_argument(
        "--speed", nargs="*", type=Path, help="by default benchmarks/results/speed_*.jsonl; none: empty"
    )
    parser.add_argument("--suite", nargs="+", type=Path, help="what should have been run, to say what is missing")
    parser.add_argument("--output", type=Path, default=Path("outputs/report"), help="a folder")
    return parser.parse_args(arguments)


def _wanted(suites: list[Path] | None, results: list[Path]) -> list[Mapping[str, Any]] | None:
    if not suites:
        return None
    from .harness.pace import pace_path, read_pace, step_seconds, with_steps
    from .harness.suite import SuiteError, load_suites

    step_s = {name: s for path in results for name, s in step_seconds(read_pace(pace_path(path))).items()}
    try:
        return list(with_steps(load_suites(suites)[0], step_s))
    except SuiteError as error:
        raise SystemExit(f"error: {error}") from None
