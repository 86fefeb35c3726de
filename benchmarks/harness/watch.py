"""What is measured while a run trains: time and memory of the steps alone, and scores on the way."""

import statistics
from typing import Any

from transformers import TrainerCallback

from .machine import clock, peak, reset_peak


class Watch(TrainerCallback):
    """Adds up the stretches between evaluations.

    Args:
        job: The run.
        score_before: Its main metric before training; None: not scored.
    """

    def __init__(self, job: Any, score_before: float | None) -> None:
        args = job.trainer.args
        self.batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.rows = len(job.trainer.train_dataset) if args.do_train else 0
        self.main_key = f"eval_{job.trainer.family.task.main_metric}"
        self.device = args.device.type
        self.curve: list[dict[str, float]] = []
        self.step_times: list[float] = []
        self.steps = self.tokens = self.most_memory = self.before = 0
        if score_before is not None:
            self.point(score_before)

    @property
    def train_time_s(self) -> float:
        """Seconds of training so far."""
        return sum(self.step_times, 0.0)

    @property
    def examples(self) -> int:
        """Rows trained on so far; the last batch of an epoch may be smaller than the others."""
        epochs, steps = divmod(self.steps, max(1, -(-self.rows // self.batch_size)))
        return epochs * self.rows + steps * self.batch_size

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the first stretch."""
        self.before = reset_peak(self.device)
        self.mark = clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """One step, its batch's collation included."""
        now = clock()
        self.step_times.append(now - self.mark)
        self.mark = now
        self.steps, self.tokens = state.global_step, int(state.num_input_tokens_seen)
        last = self.steps >= state.max_steps
        if control.should_evaluate or last:
            self.most_memory = max(self.most_memory, peak(self.device))
        if last:
            control.should_evaluate = False  # the end is scored once, after training
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Keep the score, and start the next stretch."""
        self.point((metrics or {})[self.main_key])
        reset_peak(self.device)
        self.mark = clock()

    def point(self, score: float) -> None:
        """One point of the learning curve."""
        self.curve.append({"examples": self.examples, "seconds": self.train_time_s, "score": score})

    def totals(self) -> dict[str, Any]:
        """The entries of a `Result` that training decides."""
        return {
            "examples_seen": self.examples,
            "tokens_seen": self.tokens,
            "train_time_s": self.train_time_s,
            "steps": self.steps,
            "step_time_s": statistics.median(self.step_times) if self.step_times else 0.0,
            "peak_memory_bytes": max(0, self.most_memory - self.before),
        }
