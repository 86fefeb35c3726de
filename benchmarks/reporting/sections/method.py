"""How the numbers are made, and what they were made from."""

from __future__ import annotations

from collections import Counter

from ..document import Bullets, Section
from ..evidence import Evidence
from ..runs import DISTURBED
from ..statistics import MIN_SEEDS


DEFINITIONS = (
    "Score: the task's main metric after training, x 100. A difference of scores is in points.",
    "± and intervals: 95 % by Student's t over the seeds. Differences are taken by seed first. The mean of tasks is "
    "taken for each seed, each task counting the same. It leaves out tasks that half of the methods or fewer were run "
    f"on, those where most methods have fewer than {MIN_SEEDS} seeds, and those where no method's interval is above "
    "always giving the most common label, unless all tasks are so. One seed has no "
    "interval, and with three a narrow one can be luck.",
    "A seed decides which rows are trained on and in what order, and what begins at random: RANDOM, SAMPLE_VOCAB, "
    "LoRA, a probe. A RANDOM may begin alike on several tasks, so seeds are kept together over tasks.",
    f"p over seeds: paired t-test, two-sided, from {MIN_SEEDS} seeds on. p over rows: each scored row has the number "
    "of seeds that were right; exact sign-flip test on the differences of these numbers, each task counting the same. "
    "It needs the answers of single rows, which regression does not have, and asks which were right whatever the main "
    "metric is. It is about the models that were trained: what it alone finds is probably true of them on other rows, "
    "but two other seeds of the same methods may differ the other way.",
    "Larger than the noise: both p < 0.05 with the same sign. Within the noise: neither. Nothing is corrected for "
    "the number of comparisons: of twenty that are noise, one looks larger over seeds, and more than one over rows. "
    "The best of several inits is found on the rows that it is then compared on, which favours the method with the "
    "most variants.",
    "Training: seconds of the steps alone, no scoring, no loading; see pace. Memory is above the loaded model, the "
    "most of any seed: of the process (rss) or of the GPU's allocator (cuda). Memory with the model is their sum; "
    "where nothing is trained it is the model alone, and scoring needs some more. Prompts of one length do the same "
    "work whatever their init: what their memory differs by is noise.",
    "Bytes to store for a task: the adapter's file; the head of a linear probe; the whole model after full "
    "fine-tuning. Storage for several tasks has the model in it once, in the precision that it is used in.",
    "Time to a score: seconds of training, with its source's, at the first point of the curve that is at least as "
    "high, the mean over the seeds, where all came so far. Points are few, so it is the end of a stretch in which the "
    "score was reached.",
    "Times x of another method: of the seeds that both were timed with.",
    "Inference time: one scored batch with the adapter over the same batch without it.",
    "Forgetting: the loss per token on text that the task has nothing to do with, adapter on, minus the bare model's.",
    "Pace: the mean seconds of a step of each method, task and budget, a step of each taken in turn in one process. "
    "Where it was taken a run's seconds of training are its steps at this pace, and runs of kinds that were not timed "
    "have none; else they are as measured, of undisturbed runs on the machine that ran most. Where rows are grouped "
    "by length the longest of a group come first: the points of a curve are spread as they were in the run.",
    f"Disturbed: other programs used more than {100 * DISTURBED:.0f} % of the machine's CPU time that was timed.",
)


def method_section(evidence: Evidence) -> Section:
    """Definitions, and the files."""
    files = [f"{store.name}: {store.lines} lines, sha256 {store.sha256}." for store in evidence.stores]
    return Section("method", "How the numbers are made", [Bullets([*DEFINITIONS, *files])])


def facts(evidence: Evidence) -> list[str]:
    """What the reader should know before the first number."""
    counted = [run for run in evidence.runs if run.counts]
    states = Counter(run.state for run in evidence.runs if not run.counts)
    others = "".join(f", {count} {state}" for state, count in sorted(states.items()))
    tasks = ", ".join(sorted({run.spec["task"] for run in counted}))
    models = ", ".join(sorted({run.model for run in counted}))
    machines = ", ".join(sorted({" ".join(run.machine) for run in counted}))
    searched = sum(bool(run.spec["arguments"].get("held_out_samples")) for run in counted)
    of_search = f" and {searched} of a search for hyper-parameters" if searched else ""
    seeds = {run.seed for run in counted if run.spec["method"] != "zero_shot"}
    return [
        f"{len(counted) - searched} runs with a result{of_search}{others}",
        f"tasks: {tasks}",
        f"model: {models}",
        f"machine: {machines}",
        f"seeds: {', '.join(map(str, sorted(seeds))) or 'none'}",
    ]
