"""Run the grids of suites: what the store has already is not run again.

    python -m benchmarks run benchmarks/suites/smoke.yaml
    python -m benchmarks run benchmarks/suites/cpu.yaml --data_dir path/to/rows --results benchmarks/results/cpu.jsonl

Stop it at any moment, and start it again to go on. Each run has its own process and one line in the results file.
"""

import argparse
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

from .harness.store import RERUN, Event, RunStore, wanted


def main(arguments: list[str]) -> None:
    """Run what the arguments ask for, and print how each run ended."""
    from .harness.execute import Grid, run_local
    from .harness.suite import load_suites, run_id

    options = _options(arguments)
    results = options.results or Path("outputs/benchmarks", f"{options.suite[0].stem}.jsonl")
    store, number = RunStore(results), count(1)
    specs, time_limit_s = load_suites(options.suite, options.data_dir)
    latest = store.latest()
    left = [spec for spec in specs if wanted(latest.get(run_id(spec)), options.rerun)]
    print(f"{len(specs)} runs, {len(left)} to do; events go to {results}", flush=True)

    def report(spec: Any, event: Event) -> None:
        print(f"{next(number)}/{len(left)} {event['status']}: {describe(spec)}  {outcome(event)}", flush=True)

    if not options.dry_run:
        grid = Grid(left, store, options.data_dir, time_limit_s, options.rerun, report)
        if options.executor == "ray":
            from .harness.on_ray import run_on_ray

            run_on_ray(grid, options.ray_address, options.cpus_per_run, options.gpus_per_run)
        else:
            run_local(grid)
    events = store.latest()
    for spec in specs if options.dry_run else []:
        print(f"{events.get(run_id(spec), {}).get('status', 'not run')}: {describe(spec)}")
    counts = Counter(events[name]["status"] if (name := run_id(spec)) in events else "not run" for spec in specs)
    print(", ".join(f"{number} {state}" for state, number in counts.items()))


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", nargs="+", type=Path, help="YAML files, see benchmarks/suites")
    parser.add_argument("--results", type=Path, help="the store; by default outputs/benchmarks/SUITE.jsonl")
    parser.add_argument("--data_dir", help="where the folders of `data` in a suite lie, in the Hub's columns")
    parser.add_argument("--rerun", choices=RERUN, default="never", help="which of the ended runs run again")
    parser.add_argument("--executor", choices=("local", "ray"), default="local", help="one at a time, or a cluster")
    parser.add_argument("--ray_address", help="of a Ray cluster; by default one on this machine")
    parser.add_argument("--cpus_per_run", type=float, default=2, help="cores that Ray keeps for a run")
    parser.add_argument("--gpus_per_run", type=float, default=0, help="GPUs that Ray keeps for a run")
    parser.add_argument("--dry_run", action="store_true", help="only say what would be run")
    return parser.parse_args(arguments)


def describe(spec: Any) -> str:
    """A run in a few words."""
    parts = [spec["task"], spec["method"], spec["init"], spec["quantization"]]
    return " ".join([*filter(None, parts), f"{spec['budget']['examples']} examples", f"seed {spec['seed']}"])


def outcome(event: Event) -> str:
    """What came of it."""
    if event["result"] is None:
        return event["error"] or ""
    result = event["result"]
    change = f"{100 * result['score_before']:.1f} -> {100 * result['score']:.1f}"
    return f"{result['main_metric']} {change}, {result['train_time_s']:.0f} s of training"
