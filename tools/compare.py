"""Compare runs: a table for each data set, over run folders, seeds as mean +- standard deviation.

    python -m tools.compare runs/*
    python -m tools.compare runs/* --by-task
    python -m tools.compare runs/* --format latex

Runs that differ in their seed or split only share a line.
"""

from dataclasses import dataclass, field

from plumbing.errors import UserError, exit_on_user_error, tell
from plumbing.flags import explicit_flags, flag
from plumbing.folders import check_numbers, mark_of_run, read_config, read_json, script_of
from plumbing.tables import comma_separated, fitted, in_markdown, latex, markdown, mean_std_text, visible, wrapped
from recipes import FEW_SHOT, FIXED_TABLE, PRETRAINING, recipe


@dataclass
class Config:
    """Compare runs, a table for each data set: a line for each group of runs that differ in seed and split only.

    examples:
      python -m tools.compare runs/strings-*
      python -m tools.compare runs/strings-* --by-task --format csv
    """

    runs: tuple = flag((), "run folder of train.py or adapt.py", metavar="RUN", positional=True)
    by_task: bool = flag(False, "a line for each task, with its score in each group of runs")
    format: str = flag("text", "text (100 columns), or to copy elsewhere", ("text", "markdown", "csv", "latex"))


if __name__ == "__main__":  # read the flags before the slow imports: --help and mistakes answer at once
    FLAGS = explicit_flags(Config, {})

import statistics
import sys
from collections import defaultdict
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import adapt
import train
from scoring import mean

# Settings that may differ in a group of runs.
MAY_DIFFER = (
    "seed", "split", "checkpoint", "output_dir", "data_dir", "device", "precision", "log_every", "save_every",
    "keep_every", "deterministic",
)  # fmt: skip

# --- From folders to groups of runs -----------------------------------------------------------------------------------


class Sample(NamedTuple):
    """A run of train.py, or one split of a run of adapt.py."""

    before: float | None  # mean score over tasks before adaptation
    score: float | None  # mean score over tasks
    seconds: float
    tasks: dict[str, float]  # the score of each task


class Name(NamedTuple):
    """What ran, with every setting that differs from the recipe."""

    what: str  # method, heads, rank
    settings: tuple[str, ...]
    variant: str = ""  # of adapt.py
    few_shot: tuple[str, ...] = ()  # settings of adapt.py

    def without(self, settings: set[str], few_shot: set[str]) -> str:
        """The name as one text, without these settings."""
        words = [self.what, *(word for word in self.settings if word not in settings)]
        words += ["->", self.variant, *(word for word in self.few_shot if word not in few_shot)] if self.variant else []
        return " ".join(words)

    def __str__(self):
        return self.without(set(), set())


@dataclass
class Group:
    """Runs that differ in seed and split only."""

    name: Name
    trained: int  # parameters (per task, for an adaptation)
    samples: list[Sample] = field(default_factory=list)
    metrics: dict[str, str] = field(default_factory=dict)  # of each task; {}: the runs do not say

    def metric(self) -> str:
        """The metric of the mean score: its name, how many there are, or "" if the runs do not say."""
        names = set(self.metrics.values())
        return f"mean of {len(names)} metrics" if len(names) > 1 else "".join(names)

    def tasks(self) -> dict[str, list[float]]:
        """The scores of each task, one a sample that has it."""
        scores = defaultdict(list)
        for sample in self.samples:
            for task, score in sample.tasks.items():
                scores[task].append(score)
        return scores


def read_groups(folders: tuple[str, ...]) -> tuple[dict[str, list[Group]], list[str]]:
    """({data set: groups of its runs}, sorted by name; folders without result.json).

    Raises UserError if a folder does not exist, its files were changed, or none is of a finished run.
    """
    groups, unfinished = {}, []
    for folder in map(Path, folders):
        if not folder.exists():
            raise UserError(f"{folder} does not exist: give run folders")
        if not (folder / "result.json").is_file():
            unfinished.append(str(folder))
            continue
        try:
            name, dataset = name_of_run(folder)
            samples, trained, metrics = _result(folder / "result.json")
        except (KeyError, TypeError, AttributeError, RecursionError):  # RecursionError: a run that continues itself
            raise UserError(f"{folder} is no run folder of this version") from None
        group = groups.setdefault((dataset, name, trained), Group(name, trained))
        group.samples += samples
        group.metrics |= metrics
    if not groups:
        raise UserError(f"give a finished run, none of these has finished: {', '.join(unfinished)}")
    by_dataset = defaultdict(list)
    for (dataset, *_), group in sorted(groups.items(), key=lambda item: item[0]):
        by_dataset[dataset].append(group)
    return by_dataset, unfinished


def _result(path: Path) -> tuple[list[Sample], int, dict[str, str]]:
    """(samples, number of trained parameters, {task: metric}) of a run. path: its result.json.

    Raises UserError for a value that is no number; KeyError, TypeError or AttributeError if it is missing or no text.
    """
    result, adapted = read_json(path), script_of(path.parent) == "adapt.py"
    score, seconds, tasks, metrics = result.get("mean"), result["seconds"], result.get("tasks"), result.get("metrics")
    check_numbers(path, result["parameters"], {"seconds": seconds} | ({} if score is None else {"mean": score}))
    if tasks is not None:
        check_numbers(path, tasks)
    samples = [] if adapted else [Sample(None, score, seconds, tasks or {})]
    for split in result["splits"].values() if adapted else ():
        check_numbers(path, split["before"], split["tasks"])
        share = seconds / len(result["splits"])
        samples.append(Sample(mean(split["before"]), mean(split["tasks"]), share, split["tasks"]))
    if not samples:
        raise KeyError("splits")
    metrics = {} if metrics is None else {task: "" + metric for task, metric in metrics.items()}
    return samples, sum(result["parameters"].values()), metrics


def name_of_run(folder: Path) -> tuple[Name, str]:
    """(what ran, data set) of a run folder."""
    adapted = script_of(folder) == "adapt.py"
    config = asdict(read_config(adapt.Config if adapted else train.Config, folder / "config.json"))
    base = asdict(read_config(train.Config, Path(config["checkpoint"]) / "config.json")) if adapted else config
    made_from = read_json(folder / "result.json").get("made_from") if adapted else None
    if made_from not in (None, "") and made_from != mark_of_run(Path(config["checkpoint"])):
        raise UserError(f"{folder}: its checkpoint {config['checkpoint']} was replaced since: leave this run out")
    method, dataset = base["method"], base["dataset"]
    words = [str(name_of_run(Path(base["from_run"]))[0]), f"-> {base['steps']} steps of"] if base["from_run"] else []
    words += [method]
    words += [f"h={base['heads']}"] if method == "mhr" else []
    words += [f"r={base['rank']}"] if method != "full" and base["adapter"] == "lora" else []
    skills = ["skills"] if method in FIXED_TABLE else []
    shown = {"method", "dataset", "heads", "rank", "variant", *MAY_DIFFER, *skills}
    adapter = dict(adapter=base["adapter"]) if method == "ia3" else {}
    settings, variant, few_shot = [], "", []
    if not base["from_run"]:  # otherwise the name of that run says it
        usual = asdict(train.Config(**adapter)) | recipe(PRETRAINING, dataset, method, base["adapter"])
        settings = _changed(base, usual, shown | {"eval_every"})  # it only looks
    if adapted:
        variant = config["variant"]
        few = recipe(FEW_SHOT, dataset, "lora" if variant == "lora" else method)
        few_shot = _changed(config, asdict(adapt.Config()) | few, shown)
    return Name(" ".join(words), tuple(settings), variant, tuple(few_shot)), dataset


def _changed(config: dict, recipe: dict, shown: set[str]) -> list[str]:
    return [f"{k}={v}" for k, v in config.items() if k not in shown and v not in ("", recipe[k])]


# --- From groups to tables: header first, then cells that are texts, numbers, or lists of scores ----------------------


def overview(groups: list[Group], labels: list[str]) -> list[tuple]:
    """A line for each group. before, score: of each run (each split of an adaptation counts as one) the mean over its
    tasks. seconds: the mean over runs."""
    lines = [("run", "metric", "trained", "runs", "before", "score", "seconds")]
    for group, label in zip(groups, labels, strict=True):
        before, score, seconds, _ = zip(*group.samples, strict=True)
        scores = ([v for v in column if v is not None] for column in (before, score))
        lines.append((label, group.metric(), group.trained, len(seconds), *scores, statistics.fmean(seconds)))
    return lines


def scores_by_task(groups: list[Group], labels: list[str]) -> list[tuple]:
    """A line for each task, a column for each group."""
    metrics = {task: metric for group in groups for task, metric in group.metrics.items()}
    scores = [group.tasks() for group in groups]
    names = dict.fromkeys(task for each in scores for task in each)
    rows = [(task, metrics.get(task, ""), *(each.get(task, []) for each in scores)) for task in names]
    return [("task", "metric", *labels), *rows]


def in_full(datasets: dict[str, list[Group]], by_task: bool) -> list[tuple]:
    """All data sets in one table for csv: a list of scores becomes its mean, standard deviation and number. by_task: a
    line for each task of each group."""
    several = ("score",) if by_task else ("before", "score")
    header = ("run", "trained", "task", "metric", "score") if by_task else overview([], [])[0]
    lines = [("data_set", *chain(*((f"{h}_mean", f"{h}_std", f"{h}_n") if h in several else (h,) for h in header)))]
    for dataset, groups in datasets.items():
        rows = overview(groups, [str(group.name) for group in groups])[1:]
        if by_task:
            of_task = ((group, task, scores) for group in groups for task, scores in group.tasks().items())
            rows = [(g.name, g.trained, task, g.metrics.get(task, ""), scores) for g, task, scores in of_task]
        lines += [(dataset, *chain(*(spread(c) if isinstance(c, list) else (c,) for c in row))) for row in rows]
    return lines


def spread(values: list[float]) -> tuple:
    """(mean, standard deviation, number) of values; "" for what is not defined."""
    n = len(values)
    return statistics.fmean(values) if n else "", statistics.stdev(values) if n > 1 else "", n


def common(groups: list[Group]) -> tuple[set[str], set[str]]:
    """The settings that all groups have, and those of adapt.py that all adaptations have; none where there is one."""
    settings = [set(group.name.settings) for group in groups]
    few_shot = [set(group.name.few_shot) for group in groups if group.name.variant]
    return tuple(set.intersection(*each) if len(each) > 1 else set() for each in (settings, few_shot))


def table_of(dataset: str, groups: list[Group], by_task: bool, format: str) -> str:
    """The table of one data set, with its title, as text, markdown or latex."""
    hidden = common(groups)
    lines = (scores_by_task if by_task else overview)(groups, [group.name.without(*hidden) for group in groups])
    sign = "+-" if format == "text" else "±"
    number = lambda cell: mean_std_text(cell, sign) if isinstance(cell, list) else f"{cell:,.0f}"  # noqa: E731
    lines = [tuple(cell if isinstance(cell, str) else number(cell) for cell in line) for line in lines]
    whose = zip(("all runs", "adaptations"), hidden, strict=True)
    note = "; ".join(f"{who}: {' '.join(sorted(settings))}" for who, settings in whose if settings)
    if format == "text":  # the name of a task is better not broken
        table = fitted(lines, left=2, first=40 if by_task else 20)
        return "\n".join((dataset, *(wrapped(visible(note), 100) if note else ()), table))
    if format == "latex":
        return (f"% {visible(note)}\n" if note else "") + latex(lines, 2, dataset)
    return "\n\n".join((f"### {dataset}", *([in_markdown(note)] if note else ()), markdown(lines, 2)))


def compare(folders: tuple[str, ...], by_task: bool = False, format: str = "text") -> str:
    """A table for each data set over finished run folders, in a format of --format; csv: one table, numbers in full.

    Folders without result.json are named on standard error. Raises UserError as `read_groups` does, and if by_task
    finds no scores of tasks.
    """
    datasets, unfinished = read_groups(folders)
    if unfinished:
        print(f"without result.json: {', '.join(unfinished)}", file=sys.stderr)
    if by_task:
        scored = {dataset: [group for group in groups if group.tasks()] for dataset, groups in datasets.items()}
        datasets = {dataset: groups for dataset, groups in scored.items() if groups}
        if not datasets:
            raise UserError("--by-task: these runs scored no task: leave it out, or train with --eval-examples above 0")
    if format == "csv":
        return comma_separated(in_full(datasets, by_task))
    return "\n\n".join(table_of(dataset, groups, by_task, format) for dataset, groups in datasets.items())


def main(flags: dict):
    cfg = Config(**flags)
    tell(compare(tuple(cfg.runs), cfg.by_task, cfg.format))


if __name__ == "__main__":
    exit_on_user_error(main, FLAGS)
