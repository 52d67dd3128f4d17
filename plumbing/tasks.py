"""A run over tasks, one after another, with one result file each: what stands beside the loop of `adapt.py`.

    with TaskRun(folder, made_with) as run:
        for task in run.tasks(tasks, split, "adapt"):    # those that are not done
            ...
            run.record(lines, before=..., stops=..., metrics=...)
        results = run.results()                          # of all, also those done before an interruption

A task that has its result file is done: a resumed run skips it.
"""

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from plumbing import processes
from plumbing.ahead import Part, parts_of
from plumbing.checkpoint import marks_of_tasks
from plumbing.folders import check_numbers, read_json, refuse_other, write_json
from plumbing.run import Log
from plumbing.tables import shortened


EXAMPLES = {"after": "predictions.jsonl", "before": "before.predictions.jsonl"}  # files of scored examples


class InStep:
    """What the processes share that compute one task together, each a share of every batch; or one process alone."""

    def __init__(self, shard: bool):
        self.count = processes.count() if shard else 1

    def parts_of(self, batch: list, **options) -> list[Part]:
        """`ahead.parts_of` for this process's examples of a batch."""
        items = batch if self.count == 1 else processes.share(batch)
        return parts_of(items, batch=batch, in_step=self.count, **options)

    def sum(self, parameters: list, loss: Tensor) -> Tensor:
        """Sum gradients and loss over the processes; returns the loss."""
        return loss if self.count == 1 else processes.sum_gradients(parameters, loss, stop=0)[0]

    def agreed(self, value: float) -> float:
        """A value that decides what is computed next: the first process's, for all."""
        return value if self.count == 1 else processes.as_first(value)


class TaskRun(Log):
    """Within this context: the log, the bar, and SPLIT/TASK.json for each task that is done.

    made_with: {"backbone": hash, ...}; a result that was made with something else is refused (UserError). Of several
    processes each takes its share of the tasks; shard: of each batch of every task (`large.py`).
    """

    def __init__(self, folder: Path, made_with: dict[str, str], shard: bool = False, board: bool = False):
        self.folder, self.made_with, self.seconds, self.paces = folder, made_with, 0.0, []
        self.in_step = processes.count() if shard else 1  # how many processes compute a task together
        self.writes = self.in_step == 1 or processes.first()
        done = lambda line: (folder / line["split"] / f"{line['task']}.json").exists()  # noqa: E731
        super().__init__(folder, done, everyone=self.in_step == 1, board=board)
        self.examples = {
            when: Log(folder, done, everyone=self.in_step == 1, name=name) for when, name in EXAMPLES.items()
        }

    def __enter__(self):
        for log in self.examples.values():
            log.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        for log in self.examples.values():
            log.__exit__(*error)

    def tasks(self, tasks: list, split: str, title: str) -> Iterator:
        """Those of this process's tasks (`data.Task`) that are not done, with a bar that shows the scores of each."""
        self.own = {}
        (self.folder / split).mkdir(parents=True, exist_ok=True)
        mine = processes.share(tasks) if self.in_step == 1 else tasks
        form = "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"  # at 80 columns the score must be seen
        for task in (bar := tqdm(mine, desc=title, bar_format=form, disable=None)):
            self.split, self.file_of_task = split, (path := self.folder / split / f"{task.name}.json")
            self.made = self.made_with | {"data set": marks_of_tasks([task])}
            if not path.exists():
                self.start = time.monotonic()
                yield task
            if self.in_step > 1:
                processes.wait()  # until the result is written
            one = read_json(path, before=float, stops=dict, metrics=dict, seconds=float, made_with=dict)
            self.own[task.name] = one = {"examples_per_second": 0.0} | one  # files of earlier versions lack it
            check_numbers(path, one["metrics"], {k: one[k] for k in ("before", "seconds", "examples_per_second")})
            refuse_other(path, one["made_with"], self.made)
            self.seconds += one["seconds"]
            self.paces += [one["examples_per_second"]] * (one["examples_per_second"] > 0)
            before, after = f"{one['before']:.1f}", f"{next(iter(one['metrics'].values())):.1f}"
            bar.set_postfix_str(f"{shortened(task.name, 26)} {before} -> {after}")
            if bar.disable:
                print(f"{task.name:40} split {split:5} before {before:>5}  after {after:>5}", flush=True)

    def record(self, lines: dict[str, list[dict]], **result):
        """The task is done: write its result file. lines: its scored examples, for each file of EXAMPLES. result:
        "before", "stops", "metrics" (the main one first) and "examples_per_second"."""
        if self.writes:
            for when, log in self.examples.items():
                for line in lines[when]:
                    log.write({"split": self.split, **line})
                log.flush_to_disk()
            self.flush_to_disk()
            write_json(self.file_of_task, result | {"seconds": time.monotonic() - self.start, "made_with": self.made})

    def pace(self) -> float:
        """Training examples per second in a task's loop, the mean over this process's tasks."""
        return round(statistics.fmean(self.paces or [0.0]), 1)

    def results(self) -> dict[str, dict]:
        """{task name: content of its result file} of the tasks of the last split, those of all processes."""
        return processes.together(self.own)
