"""The mean score of a task, and of GLUE (Wang et al. 2018) or SuperGLUE (Wang et al. 2019) as a whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from ._choices import check_choice
from .metrics import GLUE_METRICS, SUPER_GLUE_METRICS


_COUNTED = {
    **GLUE_METRICS,
    **SUPER_GLUE_METRICS,
    "multirc": ("exact_match", "f1_a"),
    "super_glue_rte": ("accuracy",),
}
_MNLI = ("mnli_matched", "mnli_mismatched")
_BENCHMARKS = {
    "glue": tuple(name for name in GLUE_METRICS if name != "mnli"),
    "super_glue": (*SUPER_GLUE_METRICS, "super_glue_rte"),
}


def combined_score(scores: Mapping[str, float], task_name: str) -> float:
    """The one number of a task: the mean over the metrics that count in its paper.

    Args:
        scores: What the task's metric computed.
        task_name: A name of `GLUE_METRICS` or `SUPER_GLUE_METRICS`, or "super_glue_rte".

    Returns:
        All of a task's metrics count, but for multirc's `f1_m` (Wang et al. 2019).

    Raises:
        ValueError: Unknown task, or one of its metrics is missing.
    """
    check_choice("task_name", task_name, tuple(_COUNTED))
    counted = _COUNTED[task_name]
    missing = [name for name in counted if name not in scores]
    if missing:
        raise ValueError(
            f"The score of {task_name!r} is the mean of {', '.join(counted)}; got {', '.join(scores) or 'nothing'}. "
            f"Add {', '.join(missing)}."
        )
    return float(np.mean([scores[name] for name in counted]))


def benchmark_score(
    results: Mapping[str, Mapping[str, float]], benchmark: str, *, exclude: tuple[str, ...] = ()
) -> float:
    """The unweighted mean over the tasks of GLUE (Wang et al. 2018) or SuperGLUE (Wang et al. 2019).

    Args:
        results: The scores of each task. GLUE's mnli comes as mnli_matched and mnli_mismatched, whose mean is one
            task's score. SuperGLUE's rte may be called "super_glue_rte".
        benchmark: "glue" or "super_glue".
        exclude: Tasks that neither count nor need be there: ("wnli",) gives the mean of Devlin et al. 2019 (BERT).

    Raises:
        ValueError: Unknown benchmark or task, tasks missing, or none left.
    """
    check_choice("benchmark", benchmark, tuple(_BENCHMARKS))
    known = _BENCHMARKS[benchmark]
    for name in results:
        check_choice("a task of results", name, known)
    for name in exclude:
        check_choice("a task of exclude", name, (*known, "mnli") if benchmark == "glue" else known)
    if {"rte", "super_glue_rte"} <= set(results):
        raise ValueError("SuperGLUE has one rte; got 'rte' and 'super_glue_rte'. Leave GLUE's out.")
    results = {name.removeprefix("super_glue_"): scores for name, scores in results.items()}
    left_out = {name.removeprefix("super_glue_") for name in exclude} | set(_MNLI if "mnli" in exclude else ())
    wanted = [name for name in known if name not in left_out | {"super_glue_rte"}]
    missing = [name for name in wanted if name not in results]
    if missing or not wanted:
        raise ValueError(
            f"The mean of {benchmark} needs the scores of {', '.join(wanted) or 'at least one task'}; "
            f"missing: {', '.join(missing) or 'all'}. Score them, or name them in exclude."
        )
    by_task: dict[str, list[float]] = defaultdict(list)
    for name in wanted:
        by_task["mnli" if name in _MNLI else name].append(combined_score(results[name], name))
    return float(np.mean([np.mean(parts) for parts in by_task.values()]))
