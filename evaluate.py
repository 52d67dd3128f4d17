"""Evaluation: score a run by each task's own metric, with generated or chosen answers.

    python evaluate.py --checkpoint runs/NAME              a pre-training run: its training tasks' test examples;
                                                           an adaptation run: its adapted tasks
    python evaluate.py --checkpoint runs/NAME --zero-shot  a pre-training run on the held-out tasks, not adapted
    python evaluate.py --checkpoint runs/NAME --constant   the held-out tasks' most frequent training answer, no model

With --save NAME.json the scores are in that file, and every scored example in NAME.predictions.jsonl, task by task: the
same command, if it was cut off, scores the tasks that are not there yet (`python -m tools.show NAME.predictions.jsonl`
prints them). Without it NAME is evaluation or zero-shot, in the run folder, and evaluation-2 after that.

Several runs in one table: `python -m tools.compare RUN RUN ...`
"""

from dataclasses import asdict, dataclass, replace

from plumbing.errors import UserError, exit_on_user_error
from plumbing.flags import check_ranges, explicit_flags, flag, one_job
from plumbing.folders import (
    mark_of_run,
    read_config,
    read_lines,
    refuse_other,
    refuse_other_tasks,
    script_of,
    write_json,
)
from recipes import FEW_SHOT, recipe


@dataclass
class Config:
    """Score a run.

    examples:
      python evaluate.py --checkpoint runs/strings-mhr-0
      python evaluate.py --checkpoint runs/strings-mhr-0 --zero-shot
    """

    checkpoint: str = flag(
        "", "run folder of train.py or adapt.py to score", metavar="RUN", group="what to score", required=True
    )
    zero_shot: bool = flag(False, "score a pre-training run on the held-out tasks without adaptation")
    constant: bool = flag(False, "score the most frequent training answer of each held-out task")
    split: str = flag("", "which few-shot examples, for --constant and t0; none: the first of the recipe's")
    data_dir: str = flag("", "folder of the benchmark's files, if it has moved since training", metavar="DIR")
    test_examples: int = flag(0, "test examples per task to score; 0: all", group="how")
    batch_size: int = flag(64, "examples per batch")
    beams: int = flag(
        0, "beams of beam search; 1 is greedy; 0: those of the run of adapt.py, of the recipe (--zero-shot), 1"
    )
    save: str = flag(
        "",
        "JSON file for the scores, with all scored examples beside it; none: in the run folder (--constant: nowhere)",
        metavar="FILE",
    )
    device: str = flag("auto", "auto: cuda if there is one, else cpu", ("auto", "cpu", "cuda", "mps"))


MOVED = {
    "compare": "is a command now: python -m tools.compare RUN RUN ...",
    "count_parameters": "is a command now: python -m tools.count_parameters --backbone NAME",
    "memory": "is a command now: python -m tools.estimate_memory --backbone NAME --batch-size N",
} | dict.fromkeys(
    ("backbone", "training_tasks", "max_input", "max_output"),
    "belongs to python -m tools.count_parameters or tools.estimate_memory now",
)

if __name__ == "__main__":  # read the flags before the slow imports: --help and mistakes answer at once
    FLAGS = explicit_flags(Config, {}, moved=MOVED)

import itertools
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

import adapt
import benchmarks
import data
import train
from data import Task
from methods import build_model, load_adapter_file, load_run
from plumbing import processes
from plumbing.backbones import advice_on_memory, pick_device
from plumbing.checkpoint import marks_of_tasks
from plumbing.run import Log
from plumbing.tables import counted
from scoring import all_scores, by_group, constant_scores, main_scores, mean, scores_of

OF_RUN, OF_MODEL = ("save", "data_dir", "test_examples"), ("batch_size", "beams", "device")
USES = {  # the companion flags of each job
    "checkpoint": (*OF_RUN, *OF_MODEL), "zero_shot": ("checkpoint", "split", *OF_RUN, *OF_MODEL),
    "constant": ("checkpoint", "split", *OF_RUN),
}  # fmt: skip


def evaluate(cfg: Config) -> dict[str, float]:
    """Score a run folder of train.py or adapt.py and print one line a task; returns {task name: main score}."""
    check_ranges(cfg)
    processes.join(pick_device(cfg.device))  # each then scores all, for a run of --shard together
    if cfg.save and processes.first():
        refuse_save(Path(cfg.save))  # now, not after hours of scoring
    folder = Path(cfg.checkpoint)
    adapted = script_of(folder) == "adapt.py"
    if adapted and (cfg.zero_shot or cfg.constant):
        flag = "--zero-shot" if cfg.zero_shot else "--constant"
        raise UserError(f"{flag} needs a run folder of train.py, this one is of adapt.py")
    if not (cfg.save or cfg.constant):
        cfg = replace(cfg, save=default_save(cfg))
    score_run = _score_adapted if adapted else _score_held_out if cfg.zero_shot or cfg.constant else _score_pretrained
    with advice_on_memory("a smaller --batch-size", then=""), Saved(cfg) as saved:
        scores, tasks = score_run(cfg, folder, saved)
    print_scores(scores, by_group(main_scores(scores), tasks))
    if cfg.save and processes.first():
        write_json(Path(cfg.save), {"mean": mean(main_scores(scores)), "tasks": scores})
        print(f"saved in {cfg.save}")
    return main_scores(scores)


def default_save(cfg: Config) -> str:
    """The file of --save, where it is not given: the first name in the run folder that is free, or that of an
    evaluation with these settings which was cut off."""
    name = "zero-shot" if cfg.zero_shot else "evaluation"
    for k in itertools.count(1):
        path = Path(cfg.checkpoint) / (f"{name}-{k}.json" if k > 1 else f"{name}.json")
        begun = predictions_of(path)
        if not path.exists() and (not begun.exists() or read_lines(begun)[:1] in ([], [head_of(cfg)])):
            break
    if processes.first():
        refuse_save(path)
    return str(path)


def predictions_of(save: Path) -> Path:
    """Where the scored examples are saved, beside the scores."""
    return Path(f"{str(save).removesuffix('.json')}.predictions.jsonl")


def head_of(cfg: Config) -> dict:
    """The first line of the scored examples: what a resumed evaluation must have in common with this one."""
    same = {name: value for name, value in asdict(cfg).items() if name not in ("save", "batch_size", "device")}
    folder = Path(cfg.checkpoint)
    return same | {"checkpoint": str(folder), "made_by": mark_of_run(folder)}


def refuse_save(path: Path):
    """Raise UserError if a file is there already, or none can be made there: nothing is ever overwritten."""
    if path.exists():
        raise UserError(f"--save {path} exists: choose another name or delete it")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name):
            pass
    except OSError as error:
        raise UserError(f"--save {path} cannot be written: {error.strerror}; give another --save") from None


class Saved:
    """The scored examples of --save, within this context: NAME.predictions.jsonl.

    Its first line has the settings, and a line {"done": TASK, ...} ends each task: what comes without one was cut off,
    and is removed; so is a file without a task. Raises UserError if the file is of an evaluation with other settings or
    data, or in use.
    """

    def __init__(self, cfg: Config):
        self.path = predictions_of(Path(cfg.save)) if cfg.save and not cfg.constant else None
        self.head, self.outputs = head_of(cfg), {}

    def __enter__(self):
        self.log = None
        if not self.path:
            return self
        self.lock = FileLock(f"{self.path}.lock")
        try:
            if processes.first():
                self.lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"another process writes {self.path}: wait, or choose another --save") from None
        head, *lines = (read_lines(self.path) if self.path.exists() else None) or [None]
        if head not in (None, self.head):
            raise UserError(f"{self.path} is of another run or other settings: choose another --save, or delete it")
        try:
            self.marks = {(line["split"], line["done"]): line["made_with"] for line in lines if "done" in line}
            self.outputs = {key: [] for key in self.marks}
            for line in lines:
                if "done" not in line and (key := (line["split"], line["task"])) in self.outputs:
                    self.outputs[key].append(line["output"])
        except (KeyError, TypeError):
            raise UserError(f"{self.path} was changed by hand: choose another --save, or delete it") from None
        if self.outputs:
            print(f"going on: {counted(len(self.outputs), 'task')} of {self.path} not scored again")
        of = lambda line: (line["split"], line.get("task", line.get("done")))  # noqa: E731
        stays = lambda line: line == head or of(line) in self.outputs  # noqa: E731
        self.some = bool(self.outputs)  # whether a task is done
        self.log = Log(self.path.parent, stays, name=self.path.name).__enter__()
        if head is None:
            self.log.write(self.head)
        return self

    def __exit__(self, *error):
        if self.log:
            self.log.__exit__(*error)
            if processes.first() and not self.some:
                self.path.unlink()
        if self.path:
            self.lock.release()
            Path(self.lock.lock_file).unlink(missing_ok=True)

    def scores(self, model, tokenizer, tasks: list[Task], ids: list[int], *how, limit: int, split: str = "", **more):
        """`all_scores` of these tasks, of which only those are computed that are not in the file."""
        known, found, lines = {}, {}, []
        for task in tasks:
            if (outputs := self.outputs.get((split, task.name))) is not None:
                refuse_other(self.path, self.marks[split, task.name], {"data set": marks_of_tasks([task])})
                known[task.name] = scores_of(task, outputs, task.test[: limit or None])
        left = [(k, task) for k, task in zip(ids, tasks, strict=True) if task.name not in known]
        if left:
            numbers, some = zip(*left, strict=True)
            found = all_scores(model, tokenizer, some, numbers, *how, limit=limit, lines=lines, **more)
        for name in found if self.log else ():
            for line in lines:
                if line["task"] == name:
                    self.log.write({"split": split, **line})
            (task,) = (task for task in tasks if task.name == name)
            self.log.write({"split": split, "done": name, "made_with": {"data set": marks_of_tasks([task])}})
            self.some = True
        return {task.name: (known | found)[task.name] for task in tasks}


def print_scores(scores: dict[str, dict[str, float]], groups: dict[str, float]):
    """One aligned line a task, with its metrics, then the means of groups if tasks have any, then the mean."""
    lines = [(name, "  ".join(f"{m} {v:.1f}" for m, v in values.items())) for name, values in scores.items()]
    lines += [(f"[{group}]", f"{value:.1f}") for group, value in groups.items()]
    names = dict.fromkeys(m for values in scores.values() for m in values)
    means = {m: statistics.fmean(v[m] for v in scores.values() if m in v) for m in names}
    lines.append(("mean of main metrics", f"{mean(main_scores(scores)):.1f}"))
    if any(len(values) > 1 for values in scores.values()):
        lines += [(f"mean {m}", f"{value:.1f}") for m, value in means.items()]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:{width}}  {text}")


def _score_pretrained(cfg: Config, folder: Path, saved: Saved):
    """The training tasks under their own rows of Z: (scores, tasks)."""
    base = train.run_config(cfg.checkpoint, cfg.data_dir, cfg.device)
    tasks = benchmarks.load_for(base, base.split, ("train",)).train
    refuse_other_tasks(folder, base.method, tasks)
    ids = [t for t, task in enumerate(tasks) if task.test]
    if not ids:
        raise UserError(f"--checkpoint {folder}: its training tasks have no test examples")
    model, tokenizer = load_run(folder, base)
    beams = cfg.beams or 1  # as train.py scores them
    scores, lengths = {}, (base.max_input, base.max_output)
    print(data.preview([tasks[t] for t in ids], tokenizer, model.config.is_encoder_decoder, *lengths, part="test"))
    for few in (ids[k : k + 16] for k in range(0, len(ids), 16)):  # t0's 313 tasks have too many rows to hold at once
        some = [tasks[t] for t in few]
        how = dict(limit=cfg.test_examples, batch_size=cfg.batch_size, beams=beams)
        scores |= saved.scores(model, tokenizer, some, few, lengths, **how)
    return scores, [tasks[t] for t in ids]


def beams_of(base: train.Config) -> int:
    """The beams with which the recipe scores held-out tasks of a run's benchmark."""
    return recipe(FEW_SHOT, base.dataset, base.method).get("beams", 1)


def _score_held_out(cfg: Config, folder: Path, saved: Saved):
    """The held-out tasks, under a fresh row of Z or by their most frequent answer: (scores, tasks)."""
    base = train.run_config(cfg.checkpoint, cfg.data_dir, cfg.device)
    split = cfg.split or recipe(FEW_SHOT, base.dataset, base.method).get("split", "0")[0]
    tasks = benchmarks.held_out(benchmarks.load_for(base, split, ("test",)), "all")
    if cfg.constant:
        tasks = [task for task in tasks if task.train and task.test]
        if not tasks:
            raise UserError("--constant: no held-out task has training and test examples here, leave the flag out")
        return constant_scores(tasks, cfg.test_examples), tasks
    torch.manual_seed(base.seed)  # a new task's embedding under HyperFormer is drawn
    model, tokenizer = load_run(folder, base)
    begin = adapt.prepare(model, base, adapt.Config(checkpoint=str(folder)))
    beams = cfg.beams or beams_of(base)
    scores, lengths = {}, (base.max_input, base.max_output)
    print(data.preview(tasks, tokenizer, model.config.is_encoder_decoder, *lengths, part="test"))
    for task in tqdm(tasks, desc="held-out tasks", unit="task", disable=None):
        begin(task)
        how = dict(limit=cfg.test_examples, batch_size=cfg.batch_size, beams=beams)
        scores |= saved.scores(model, tokenizer, [task], [0], lengths, **how)
    return scores, tasks


def _score_adapted(cfg: Config, folder: Path, saved: Saved):
    """Every task of an adaptation run with the adapter that was saved for it, averaged over splits: (scores, tasks)."""
    run = adapted_config(folder, cfg.data_dir, cfg.device)
    limit = cfg.test_examples or run.test_examples
    several, tasks = defaultdict(list), {}
    how = dict(limit=limit, batch_size=cfg.batch_size, beams=cfg.beams or run.beams)
    for split, task, model, tokenizer, lengths in load_adapted(run, folder):
        if not several:
            print(data.preview([task], tokenizer, model.config.is_encoder_decoder, *lengths, part="test"))
        scores = saved.scores(model, tokenizer, [task], [0], lengths, split=split, **how)
        several[task.name].append(scores[task.name])
        tasks[task.name] = task
    means = {
        name: {m: statistics.fmean(values[m] for values in splits) for m in splits[0]}
        for name, splits in several.items()
    }
    return means, list(tasks.values())


def adapted_config(folder: Path, data_dir: str = "", device: str = "auto") -> adapt.Config:
    """The settings of a run of adapt.py, as they are on this machine. Raises UserError for any other folder."""
    run = read_config(adapt.Config, folder / "config.json")
    return replace(run, data_dir=data_dir or run.data_dir, device=device)


def load_adapted(cfg: adapt.Config, folder: Path):
    """For each split and task of a finished adaptation run: (split, task, model, tokenizer, lengths), with the adapter
    that was saved for the task."""
    base = adapt.base_config(cfg)
    model, tokenizer = load_run(Path(cfg.checkpoint), base)
    begin = adapt.prepare(model, base, cfg)
    for split in cfg.split:
        for task in adapt.tasks_to_adapt(base, split, cfg):
            if base.method == "full" and cfg.variant != "lora":
                saved = str(folder / split / task.name)
                model, tokenizer = build_model(replace(base, backbone=saved), 1)
            elif not (path := folder / split / f"{task.name}.safetensors").is_file():
                raise UserError(f"{path} does not exist: the run in {folder} has not finished")
            else:
                begin(task)
                load_adapter_file(model, path)
            yield split, task, model, tokenizer, (base.max_input, base.max_output)


def main(flags: dict):
    """Score a run. Raises UserError if nothing is asked for, or two things at a time."""
    cfg = Config(**flags)
    check_ranges(cfg)
    if flags.get("beams") == 0:
        raise UserError("--beams must be above 0, not 0")
    one_job(cfg, flags, USES)
    if not cfg.checkpoint:
        raise UserError("--checkpoint is missing: give a run folder of train.py or adapt.py")
    evaluate(cfg)


if __name__ == "__main__":
    exit_on_user_error(main, FLAGS)
