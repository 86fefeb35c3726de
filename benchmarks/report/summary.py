"""What the page speaks of: one model on one device, and the methods that are compared there."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from ..harness.store import StoreError
from .statistics import MIN_SEEDS, Difference, Mean, compare, interval, scores_by_seed


METHODS = ("prompt_tuning", "lora", "full", "zero_shot")
DIVERGED = 0.02  # a run that ends further below its untrained score is named


@dataclass(frozen=True)
class Summary:
    """The runs of one model on one device at one number of examples, and how many others the store has."""

    runs: pd.DataFrame
    usable: pd.DataFrame  # the runs that have a result
    seeds: list[int]
    tasks: list[str]
    model: str
    device: str
    examples: int
    elsewhere: int

    def of(self, variant: str, tasks: Sequence[str]) -> pd.DataFrame:
        """The usable runs of a variant on some tasks."""
        return self.usable[(self.usable["variant"] == variant) & self.usable["task"].isin(tasks)]

    def method(self, variant: str) -> str:
        """The method of a variant."""
        return str(self.of(variant, self.tasks)["method"].iloc[0])

    def tasks_of(self, variant: str) -> list[str]:
        """Tasks on which a variant has enough seeds."""
        counts = self.of(variant, self.tasks).groupby("task")["seed"].nunique()
        return sorted(counts[counts >= min(MIN_SEEDS, len(self.seeds))].index)

    def score(self, variant: str, tasks: Sequence[str]) -> Mean | None:
        """The mean over tasks and seeds; None if a task is missing."""
        runs = self.of(variant, tasks)
        scores = scores_by_seed(runs) if set(runs["task"]) == set(tasks) else []
        return interval(list(scores)) if len(scores) else None

    def difference(self, first: str, second: str, tasks: Sequence[str]) -> Difference | None:
        """The first variant minus the second on tasks that both have."""
        sides = [self.of(variant, tasks) for variant in (first, second)]
        return compare(*sides) if all(set(side["task"]) == set(tasks) for side in sides) else None

    def cost(self, variant: str, tasks: Sequence[str], column: str) -> float:
        """Of training or storing a task: the most bytes, or the mean of seconds and of a ratio of times."""
        values = self.of(variant, tasks).groupby("task")[column]
        return float(values.max().max() if column.endswith("bytes") else values.median().mean(skipna=False))

    def variants(self, method: str | None = None, whole: bool = False) -> list[str]:
        """The variants of a method, those over a base model in full precision alone if `whole`."""
        runs = self.usable if method is None else self.usable[self.usable["method"] == method]
        return list((runs[runs["quantization"].isna()] if whole else runs)["variant"].unique())

    def precisions(self, method: str) -> list[str]:
        """The best variant of a method, and those that differ from it in the precision of the base model alone."""
        runs, best = self.usable.fillna({"init": ""}), self.best(method)
        same = ["method", "init", "is_suffix"]
        alike = runs[runs["task"].isin(self.common)].merge(runs.loc[runs["variant"] == best, same].drop_duplicates())
        return sorted(alike["variant"].unique(), key=lambda variant: variant != best)

    @cached_property
    def at_majority(self) -> list[str]:
        """Tasks on which no method clearly beats giving the most common label: what methods differ by is noise."""
        found = []
        for task in self.tasks:
            level = self.usable.loc[self.usable["task"] == task, "majority"].max()
            means = [self.score(variant, [task]) for variant in self.variants() if task in self.tasks_of(variant)]
            lowest = [mean.mean - (mean.half or 0.0) for mean in means if mean is not None]
            found += [task] if pd.notna(level) and max(lowest, default=0.0) <= level else []
        return found

    def best(self, method: str) -> str | None:
        """The variant of a method that was run on the most tasks, of several the one with the highest mean there."""

        def rank(variant: str) -> tuple[int, float]:
            learnt = [task for task in self.tasks_of(variant) if task not in self.at_majority]
            return len(self.tasks_of(variant)), self.of(variant, learnt)["score"].mean()

        return max(self.variants(method, whole=True), key=rank, default=None)

    @cached_property
    def compared(self) -> list[str]:
        """The best prompt, LoRA, full fine-tuning and zero-shot, those of them that have runs."""
        return [best for method in METHODS if (best := self.best(method)) is not None]

    @cached_property
    def common(self) -> list[str]:
        """Tasks that all compared variants have; those at the majority only if there is nothing else."""
        shared = [task for task in self.tasks if all(task in self.tasks_of(variant) for variant in self.compared)]
        return [task for task in shared if task not in self.at_majority] or shared

    @cached_property
    def others(self) -> list[str]:
        """Tasks that are not in the means, though a method learns them."""
        return [task for task in self.tasks if task not in {*self.common, *self.at_majority}]

    @cached_property
    def diverged(self) -> pd.DataFrame:
        """Runs that ended below their untrained score, on tasks that are learnt at all."""
        learnt = self.usable[~self.usable["task"].isin(self.at_majority)]
        median = learnt.groupby(["variant", "task"])["score"].transform("median")
        return learnt.assign(median=median).query("score < score_before - @DIVERGED")


def summarise(runs: pd.DataFrame) -> Summary:
    """The model, device and number of examples that most runs have; a store without any is a StoreError."""
    trained = runs[(runs["status"] == "ok") & ~runs["is_search"] & runs["examples"].notna()]
    if trained.empty:
        raise StoreError("There is no run to compare: none has ended well outside of a search for hyper-parameters.")
    model, device, examples = trained.groupby(["model", "device", "examples"]).size().idxmax()
    is_here = (runs["model"] == model) & ~runs["is_search"] & runs["device"].isin([device, None])
    here = runs[is_here & (runs["examples"].isna() | (runs["examples"] == examples))]
    bare, seeds = here[here["method"] == "zero_shot"], here.loc[here["method"] != "zero_shot", "seed"].unique()
    here = pd.concat([here.drop(bare.index), *(bare.assign(seed=seed) for seed in seeds)], ignore_index=True)
    good = here[here["status"] == "ok"]
    found = sorted(good["seed"].unique().tolist()), sorted(good["task"].unique())
    return Summary(here, good, *found, model, device, int(examples), len(runs) - int(here["run_id"].nunique()))
