"""The report's numbers once more, by hand: nothing here comes from `benchmarks.reporting`.

`Oracle(path).tables()` has every table that the report of `tests/data/benchmark_store.jsonl` must have.
"""

import json
from fractions import Fraction
from statistics import median


T_95 = {2: 12.706204736432095, 3: 4.302652729749464}  # of Student's t, by number of values
NAMES = {
    "prompt_tuning": "Prompt tuning",
    "lora": "LoRA",
    "full": "Full fine-tuning",
    "linear_probe": "Linear probe",
    "zero_shot": "Zero-shot",
}
TASKS = ["colours", "shapes"]
ROWS = [
    "Prompt tuning, RANDOM",
    "Prompt tuning, CLASS_LABELS",
    "Prompt tuning, TEXT",
    "Prompt tuning, TRANSFER",
    "Prompt tuning, CLASS_LABELS, nf4",
    "LoRA",
    "LoRA, nf4",
    "Full fine-tuning",
    "Linear probe",
    "Zero-shot",
]
NO_ADAPTER = ["Full fine-tuning", "Linear probe", "Zero-shot"]
SHORT = ["Prompt tuning, CLASS_LABELS", "LoRA", "Full fine-tuning", "Zero-shot"]
EXAMPLES, SECONDS = "made-up-model on cpu, 80 examples", "made-up-model on cpu, 30 s of training"
BOTH = "mean of 2 tasks"


def mean(values):
    return sum(values) / len(values)


def half_width(values):
    spread = (sum((value - mean(values)) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return T_95[len(values)] * spread / len(values) ** 0.5


def t_test(differences):
    """Two-sided p of three differences; Student's distribution with 2 degrees of freedom has this closed form."""
    if len(differences) != 3:
        return None
    spread = (sum((d - mean(differences)) ** 2 for d in differences) / 2) ** 0.5
    if spread < 1e-12:
        return 1.0 if abs(mean(differences)) < 1e-12 else None
    t = mean(differences) / (spread / 3**0.5)
    return 1 - abs(t) / (2 + t * t) ** 0.5


def sign_test(of_tasks):
    """P of a sum at least as far from 0 under all signs, counted one by one; the rows of a task weigh one together."""
    differences = [Fraction(difference, len(rows)) for rows in of_tasks for difference in rows]
    ways = {Fraction(0): 1}
    for difference in differences:
        longer = {}
        for total, count in ways.items():
            for signed in (total + difference, total - difference):
                longer[signed] = longer.get(signed, 0) + count
        ways = longer
    far = sum(count for total, count in ways.items() if abs(total) >= abs(sum(differences)))
    return far / 2 ** len(differences)


def x100(value):
    return f"{100 * value:.1f}"


def signed(value):
    text = f"{100 * value:+.1f}"
    return "+0.0" if text == "-0.0" else text


def p(value):
    return "not tested" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def size(value):
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.1f} {unit}"
    return f"{value:.0f} B"


def secs(value):
    return f"{value:.2f} s" if abs(value) < 10 else f"{value:.1f} s" if abs(value) < 100 else f"{value:,.0f} s"


def plus(value, show):
    return ("-" if value < 0 else "+") + show(abs(value))


def label(spec):
    return ", ".join(filter(None, (NAMES[spec["method"]], spec["init"], spec["quantization"])))


class Oracle:
    def __init__(self, path):
        self.events, self.latest, self.line = [], {}, {}
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            try:
                event = json.loads(line)
            except ValueError:
                continue
            self.latest[event["run_id"]] = event
            self.line[event["run_id"]] = number
        self.good = {
            key: event
            for key, event in self.latest.items()
            if event["status"] == "ok" and event["result"]["score"] == event["result"]["score"]
        }
        self.cells = {}  # (setting, task, label): {seed: result}
        for event in self.good.values():
            spec, budget = event["spec"], event["spec"]["budget"]
            if "held_out_samples" in spec["arguments"]:
                continue
            both = spec["method"] == "zero_shot"
            for setting in [EXAMPLES, SECONDS] if both else [EXAMPLES if "examples" in budget else SECONDS]:
                seeds = (0, 1, 2) if both else (spec["seed"],)
                for seed in seeds:
                    self.cells.setdefault((setting, spec["task"], label(spec)), {})[seed] = event["result"]

    # single values

    def results(self, setting, task, row, timed=False):
        """What was measured, by seed; zero-shot stands for every seed."""
        found = self.cells.get((setting, task, row), {})
        return {seed: r for seed, r in found.items() if not (timed and (r["other_cpu_share"] or 0) > 0.1)}

    def seeds(self, setting, tasks, *rows):
        return sorted(set.intersection(*(set(self.results(setting, task, row)) for task in tasks for row in rows)))

    def scores(self, setting, tasks, row, seeds):
        return [mean([self.results(setting, task, row)[seed]["score"] for task in tasks]) for seed in seeds]

    def score(self, setting, tasks, row):
        """The text of a score."""
        seeds = self.seeds(setting, tasks, row)
        if not seeds:
            return None
        values = self.scores(setting, tasks, row, seeds)
        if row == "Zero-shot":
            return f"{x100(values[0])} (nothing random)"
        if len(values) == 1:
            return f"{x100(values[0])} (one seed, no interval)"
        return f"{x100(mean(values))} ± {x100(half_width(values))}" + (" (2 seeds)" if len(values) == 2 else "")

    def compared(self, setting, tasks, first, second):
        """Mean difference, half its interval, both p, and the verdict."""
        seeds = self.seeds(setting, tasks, first, second)
        if not seeds:
            return None
        sides = [self.scores(setting, tasks, row, seeds) for row in (first, second)]
        differences = [a - b for a, b in zip(*sides, strict=True)]
        rows = []
        for task in tasks:
            right = [
                [sum(int(self.results(setting, task, row)[s]["correct"][i]) for s in seeds) for i in range(n)]
                for row in (first, second)
                for n in [len(self.results(setting, task, row)[seeds[0]]["correct"])]
            ]
            rows.append([a - b for a, b in zip(*right, strict=True)])
        half = half_width(differences) if len(differences) > 1 else None
        over_seeds, over_rows = t_test(differences), sign_test(rows)
        found = [value is not None and value < 0.05 for value in (over_seeds, over_rows)]
        verdict = "larger than the noise" if all(found) else "within the noise"
        if over_seeds is None:
            verdict = (
                f"not decided ({'the same difference for every seed' if len(seeds) == 3 else 'fewer than 3 seeds'})"
            )
        elif any(found) and not all(found):
            verdict = f"not clear: the test over {'seeds' if found[0] else 'rows'} alone finds it"
        return mean(differences), half, over_seeds, over_rows, verdict, any(found)

    def points(self, setting, tasks, first, second):
        found = self.compared(setting, tasks, first, second)
        if found is None:
            return "not measured"
        middle, half = found[:2]
        if half is None:
            return f"{signed(middle)} (one seed)"
        return f"{signed(middle)} ({signed(middle - half)} to {signed(middle + half)})"

    def cost(self, setting, tasks, row, name):
        """One cost over tasks and seeds: times and losses are means, sizes the largest."""
        values = []
        for task in tasks:
            timed = name in {"time", "all_time", "step", "inference", "source", "tokens"}
            found = list(self.results(setting, task, row, timed).values())
            if row == "Zero-shot":
                found = found[:1]
            if not found or (row == "Zero-shot" and name in {"all_time", "time"}):
                return None
            take = {
                "time": lambda r: r["train_time_s"],
                "all_time": lambda r: r["train_time_s"] + (r["source_time_s"] or 0),
                "source": lambda r: r["source_time_s"],
                "step": lambda r: r["step_time_s"],
                "tokens": lambda r: r["tokens_per_s"],
                "memory": lambda r: r["weights_bytes"] + r["peak_memory_bytes"],
                "peak": lambda r: r["peak_memory_bytes"],
                "parameters": lambda r: r["trainable_parameters"],
                "stored": lambda r: r["adapter_bytes"],
                "inference": lambda r: r["inference_time_s"] / r["bare_inference_time_s"],
                "examples": lambda r: r["examples_seen"],
                "before": lambda r: r["score_before"],
                "forgetting": lambda r: (
                    None if r["unrelated_loss"] is None else r["unrelated_loss"] - r["bare_unrelated_loss"]
                ),
            }[name]
            numbers = [take(r) for r in found]
            if None in numbers:
                return None
            largest = name in {"memory", "peak", "parameters", "stored"}
            values.append(max(numbers) if largest else mean(numbers))
        return max(values) if name in {"memory", "peak", "parameters", "stored"} else mean(values)

    # tables: {(heading, caption): rows of texts}

    def tables(self):
        found = {}
        for setting, rows in ((EXAMPLES, ROWS), (SECONDS, SHORT)):
            found |= self.choice(setting, rows)
            found[setting, f"Scores: {setting} (accuracy)"] = [
                [row, *(self.score_cell(setting, tasks, row) for tasks in (["colours"], ["shapes"], TASKS))]
                for row in rows
            ]
            for task in TASKS:
                found[setting, f"What it costs: {task}, {setting}"] = [
                    self.costs(setting, task, row)
                    for row in rows
                    if (setting, task, row) != (SECONDS, "shapes", "Full fine-tuning")  # nobody tried
                ]
                found[setting, f"Numbers of the curves: {task}, {setting}"] = self.curves(setting, task, rows)
                found[setting, f"Time to a score: {task}, {setting}"] = self.times_to_scores(setting, task, rows)
            found[setting, f"Score against cost: {setting}"] = self.frontiers(setting, rows)
        found |= self.pairs()
        return found

    def score_cell(self, setting, tasks, row):
        text = self.score(setting, tasks, row)
        if text is None:
            return "out of memory" if setting == EXAMPLES else "not measured"
        return text

    def four(self, setting, row):
        """Score, memory, bytes to store and training, of all tasks."""
        score = self.score(setting, TASKS, row)
        if score is None:
            return ["no usable run", "not measured", "not measured", "not measured"]
        time = self.cost(setting, TASKS, row, "all_time")
        return [
            score,
            size(self.cost(setting, TASKS, row, "memory")),
            size(self.cost(setting, TASKS, row, "stored")),
            "no training" if row == "Zero-shot" else secs(time),
        ]

    def choice(self, setting, rows):
        known = {
            row: mean(self.scores(setting, TASKS, row, seeds))
            for row in rows
            if (seeds := self.seeds(setting, TASKS, row))
        }
        sure = [row for row in known if len(self.seeds(setting, TASKS, row)) == 3]
        best = max(sure, key=known.get)
        equal = [row for row in sure if row == best or not self.compared(setting, TASKS, row, best)[5]]
        picks = {"the highest score, whatever it costs": best}
        buts = {next(iter(picks)): {row: "no higher mean" for row in equal if row != best}}
        for reader, cost in (
            ("time is short", "all_time"),
            ("memory is short", "memory"),
            ("many tasks, storage is short", "stored"),
        ):
            near, but = equal, {}
            for name in dict.fromkeys([cost, "all_time", "memory", "stored"]):
                least = min(self.cost(setting, TASKS, row, name) for row in near)
                show, what = {
                    "all_time": (secs, "of training"),
                    "memory": (size, "of memory"),
                    "stored": (size, "to store for a task"),
                }[name]
                costs = {row: self.cost(setting, TASKS, row, name) for row in near}
                but |= {row: f"{show(c)} {what}" for row, c in costs.items() if c > 1.1 * least}
                near = [row for row in near if row not in but]
            picks[reader] = max(near, key=known.get)
            buts[reader] = but | {row: "no higher mean" for row in near if row != picks[reader]}
        caption = "What to pick (colours, shapes; the score is the mean of the tasks' main metrics x 100)"
        told = {}
        for reader, row in picks.items():
            behind = "the highest mean" if row == best else self.points(setting, TASKS, row, best)
            others = "; ".join(f"{other} ({buts[reader][other]})" for other in rows if other in buts[reader])
            told.setdefault((row, *self.four(setting, row), behind, others or "nothing"), []).append(reader)
        found = {(setting, caption): [["; ".join(readers), *line] for line, readers in told.items()]}
        asked = []
        others = ["LoRA", "Full fine-tuning", "Linear probe", "Zero-shot"]
        for other in [row for row in others if row in rows]:
            tasks = ["colours"] if other == "Full fine-tuning" else TASKS
            asked.append(self.versus(setting, best, other, tasks))
        if setting == EXAMPLES:
            for quantized in ("Prompt tuning, CLASS_LABELS, nf4", "LoRA, nf4"):
                asked.append(self.versus(setting, quantized, quantized.removesuffix(", nf4"), TASKS))
        found[setting, "What people ask first"] = asked
        evidence = []
        for row in rows:
            line = [row, *self.four(setting, row)]
            if row == best:
                line += ["the highest mean", "", "", "the pick for the highest score"]
            elif row not in known:
                state = "out of memory" if setting == EXAMPLES else "not run"
                line += ["", "", "", f"no usable run of shapes ({state})"]
            else:
                middle, _, over_seeds, over_rows, verdict, is_found = self.compared(setting, TASKS, row, best)
                so = "as good within the noise, but no higher mean"
                if row not in sure:
                    so = f"too thin: {len(self.seeds(setting, TASKS, row))} of the 3 seeds wanted"
                elif is_found:
                    both = verdict == "larger than the noise"
                    alone = "" if both else f", by the test over {'rows' if 'rows' in verdict else 'seeds'} alone"
                    so = f"{x100(-middle)} points below the best mean{alone}"
                line += [self.points(setting, TASKS, row, best), p(over_seeds), p(over_rows), so]
            evidence.append(line)
        found[setting, "The evidence: every method against the highest mean, and the p of both tests"] = evidence
        return found

    def versus(self, setting, first, second, tasks):
        ratios = []
        for name in ("all_time", "memory", "stored"):
            if second == "Zero-shot" and name != "memory":
                ratios.append("-")
                continue
            ratio = self.cost(setting, tasks, first, name) / self.cost(setting, tasks, second, name)
            if name == "all_time":
                ratio = self.time_ratio(setting, tasks, first, second)
            few = f"1/{1 / ratio:,.0f}"
            text = (
                few
                if ratio < 0.001
                else f"{ratio:.0f} x"
                if ratio >= 10
                else f"{ratio:.2f} x"
                if ratio >= 0.1
                else f"{ratio:.2g} x"
            )
            ratios.append(text)
        verdict = self.compared(setting, tasks, first, second)[4]
        by_task = [f"{task} {signed(self.compared(setting, [task], first, second)[0])}" for task in tasks]
        return [first, second, ", ".join(by_task), self.points(setting, tasks, first, second), verdict, *ratios]

    def time_ratio(self, setting, tasks, first, second):
        """Of the seeds that both were timed with on every task."""
        sides = [[self.results(setting, task, row, timed=True) for task in tasks] for row in (first, second)]
        seeds = set.intersection(*(set(of_task) for side in sides for of_task in side))
        sums = [
            sum(r[seed]["train_time_s"] + (r[seed]["source_time_s"] or 0) for r in side for seed in seeds)
            for side in sides
        ]
        return sums[0] / sums[1]

    def costs(self, setting, task, row):
        has_runs, untrained = bool(self.results(setting, task, row)), row == "Zero-shot"

        def text(name, show, of_training=True, is_timed=False):
            value = self.cost(setting, [task], row, name)
            if untrained and of_training:
                return "no training"
            if value is None or not has_runs:
                return "not measured"
            timed, all_runs = (len(self.results(setting, task, row, only)) for only in (True, False))
            return show(value) + (f" ({timed} of {all_runs} runs)" if is_timed and timed < all_runs else "")

        source = [] if setting == SECONDS else ["no training" if untrained else "no source"]
        sources = source * 2
        if row == "Prompt tuning, TRANSFER":
            sources = ["not measured", text("source", secs, is_timed=True)]  # a store from before rows were counted
        loss = self.cost(setting, [task], row, "forgetting") if has_runs else None
        return [
            row,
            text("before", x100, False),
            text("examples", lambda value: f"{value:,.0f}"),
            *sources[:1],
            text("time", secs, is_timed=True),
            *sources[1:],
            text("step", secs, is_timed=True),
            text("tokens", lambda value: f"{value:,.0f}", is_timed=True),
            text("peak", size),
            text("parameters", lambda value: f"{value:,}"),
            text("stored", size, False),
            "no adapter" if row in NO_ADAPTER else text("inference", lambda value: f"{value:.2f}", False, True),
            "not measured" if loss is None else f"{loss:+.3f}",
        ]

    def curves(self, setting, task, rows):
        lines = []
        for row in rows:
            curves = [r["curve"] for r in self.results(setting, task, row).values()]
            timed = [r["curve"] for r in self.results(setting, task, row, timed=True).values()]
            for stop in range(5 if curves and row != "Zero-shot" else 0):
                scores = [curve[stop]["score"] for curve in curves]
                examples = mean([curve[stop]["examples"] for curve in curves])
                source = mean([r["source_time_s"] or 0 for r in self.results(setting, task, row, timed=True).values()])
                seconds = source + mean([curve[stop]["seconds"] for curve in timed])
                three = [x100(mean(scores)), x100(min(scores)), x100(max(scores))]
                lines.append([row, f"{examples:,.0f}", f"{seconds:.1f}", *three])
        return lines

    def times_to_scores(self, setting, task, rows):
        """Rows, and the scores of the columns: multiples of 5 that some curve passes."""
        curves, timed = {}, {}
        for row in rows[:-1]:  # the last is zero-shot
            for only_timed, found in ((False, curves), (True, timed)):
                found[row] = [
                    [(point["score"], point["seconds"] + (r["source_time_s"] or 0)) for point in r["curve"]]
                    for r in self.results(setting, task, row, only_timed).values()
                ]
        seen = [score for of_row in curves.values() for curve in of_row for score, _ in curve]
        columns = [n for n in range(0, 101, 5) if min(seen) < n / 100 <= max(seen)]
        lines = []
        for row, of_row in curves.items():
            if not of_row:
                continue
            texts = []
            for column in columns:
                arrived = sum(any(score >= column / 100 for score, _ in curve) for curve in of_row)
                if arrived < len(of_row):
                    texts.append(f"{arrived} of {len(of_row)} seeds" if arrived else "not reached")
                    continue
                firsts = [min(after for score, after in curve if score >= column / 100) for curve in timed[row]]
                few = f" ({len(firsts)} of {len(of_row)} runs)" if len(firsts) < len(of_row) else ""
                texts.append(("before training" if max(firsts) == 0 else secs(mean(firsts))) + few)
            lines.append([row, *texts])
        return lines

    def frontiers(self, setting, rows):
        shown = {"memory": size, "parameters": lambda value: f"{value:,}", "all_time": secs, "stored": size}
        if setting == SECONDS:
            del shown["all_time"]
        names = {"memory": "memory", "parameters": "parameters", "all_time": "time", "stored": "bytes"}
        scored = [row for row in rows if self.seeds(setting, TASKS, row)]
        score = {row: mean(self.scores(setting, TASKS, row, self.seeds(setting, TASKS, row))) for row in scored}
        known = [row for row in scored if row != "Zero-shot"]
        lines = []
        for row in known:
            mine = {name: self.cost(setting, TASKS, row, name) for name in shown}
            free = []
            for name in shown:
                better = [
                    other
                    for other in known
                    for cost in [self.cost(setting, TASKS, other, name)]
                    if score[other] >= score[row] and cost <= mine[name]
                    if score[other] > score[row] or cost < mine[name]
                ]
                free += [] if better or score[row] <= score["Zero-shot"] else [names[name]]
            texts = [show(mine[name]) for name, show in shown.items()]
            lines.append([row, self.score(setting, TASKS, row), *texts, ", ".join(free) or "none"])
        return lines

    def pairs(self):
        inits = []
        for row in ROWS[1:4]:
            three = [self.points(EXAMPLES, tasks, row, ROWS[0]) for tasks in (["colours"], ["shapes"], TASKS)]
            _, _, over_seeds, over_rows, verdict, _ = self.compared(EXAMPLES, TASKS, row, ROWS[0])
            inits.append([row, *three, f"seeds {p(over_seeds)}, rows {p(over_rows)}", verdict])
        bits = []
        for row in ("Prompt tuning, CLASS_LABELS, nf4", "LoRA, nf4"):
            full = row.removesuffix(", nf4")
            for name, tasks in (("colours", ["colours"]), ("shapes", ["shapes"]), (BOTH, TASKS)):
                _, _, over_seeds, over_rows, verdict, _ = self.compared(EXAMPLES, tasks, row, full)
                costs = [
                    self.difference(tasks, row, full, key, show)
                    for key, show in (
                        ("train_time_s", secs),
                        ("step_time_s", secs),
                        ("weights_bytes", size),
                        ("peak_memory_bytes", size),
                    )
                ]
                tests = f"seeds {p(over_seeds)}, rows {p(over_rows)}"
                bits.append([row, name, self.points(EXAMPLES, tasks, row, full), tests, verdict, *costs])
        return {
            (EXAMPLES, f"Each init minus RANDOM: {EXAMPLES}"): inits,
            (EXAMPLES, f"Quantised minus full precision: {EXAMPLES}"): bits,
        }

    def difference(self, tasks, first, second, key, show):
        timed = key.endswith("time_s")
        sides = [[self.results(EXAMPLES, task, row, timed) for task in tasks] for row in (first, second)]
        seeds = sorted(set.intersection(*(set(of_task) for side in sides for of_task in side)))
        values = [mean([a[seed][key] - b[seed][key] for a, b in zip(*sides, strict=True)]) for seed in seeds]
        middle = plus(mean(values), show)
        if len(values) == 1:
            return f"{middle} (one seed)"
        ends = [plus(mean(values) + sign * half_width(values), show) for sign in (-1, 1)]
        return middle if ends == [middle, middle] else f"{middle} ({ends[0]} to {ends[1]})"

    def speed_tables(self, path):
        """Medians and ratios, one table for each precision, without the heading of a setting."""
        groups = {}
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            row = json.loads(line)
            if "error" not in row:
                groups.setdefault(row["precision"], []).append((number, row))
        found = {}
        for precision, rows in groups.items():
            time = {row["method"]: median(row["step_time_s"]) for _, row in rows}
            peak = {row["method"]: row["peak_memory_bytes"] for _, row in rows}
            lines = []
            for _, row in rows:
                method, virtual = row["method"], row["num_virtual_tokens"]
                against = ["stock"] if virtual else []
                ratios = [
                    f"{of[method] / of[other]:.2f}" if other != "stock" or against else "-"
                    for of, others in ((time, ("stock", "lora", "floor")), (peak, ("stock", "lora")))
                    for other in others
                ]
                gib = f"{peak[method] / 2**30:.2f} GiB"
                lines.append([method, str(virtual or ""), f"{time[method]:.2f} s", *ratios[:3], gib, *ratios[3:]])
            where = f"{path.name}, lines {', '.join(str(number) for number, _ in rows)}"
            caption = f"4 rows of short text, {precision}: made-up-model on made up for the tests ({where})"
            found["", caption] = lines
        return found
