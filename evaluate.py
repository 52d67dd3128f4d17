"""Evaluation: generate or choose, score by each task's own metric, compare runs.

python evaluate.py --checkpoint runs/NAME            score a run again (a pre-training run: its training tasks'
                                                     test examples; an adaptation run: its adapted tasks)
python evaluate.py --checkpoint runs/NAME --zero-shot   a pre-training run on the held-out tasks, as it is
python evaluate.py --checkpoint runs/NAME --constant    the held-out tasks' most frequent training answer, no model
python evaluate.py --compare runs/*                  one table over run folders, seeds as mean +- std
python evaluate.py --count-parameters --backbone t5-xl  what each method trains on a backbone, without its weights
python evaluate.py --memory 16 --backbone t5-xl         what training takes with batches of 16, the same way
"""

from dataclasses import asdict, dataclass, replace

from config import (
    FEW_SHOT, GIVEN, PRETRAINING, UserError, check_numbers, check_ranges, exit_on_user_error, explicit_flags, flag,
    read_config, read_json, recipe, write_json,
)  # fmt: skip


@dataclass
class Config:
    """Score a run, or compare runs."""

    checkpoint: str = flag("", "run folder of train.py or adapt.py to score")
    split: str = flag("", "which few-shot examples, for --constant and t0; none: the first of the recipe's")
    zero_shot: bool = flag(False, "score a pre-training run on the held-out tasks without adaptation")
    constant: bool = flag(False, "score the answer that is most frequent in training on each held-out task")
    save: str = flag("", "JSON file to write the scores to as well")
    compare: tuple = flag((), "run folders to compare in one table, instead of scoring")
    count_parameters: bool = flag(False, "print how many parameters each method trains on --backbone")
    memory: int = flag(0, "print the memory of training on --backbone with batches of so many examples")
    backbone: str = flag("t5-xl", "to count on: t5-xl, t5-xxl, bart-large, or a hub name, folder or config file")
    training_tasks: int = flag(313, "to count with: how many training tasks a Z is for")
    max_input: int = flag(256, "tokens of each input, for --memory")
    max_output: int = flag(256, "tokens of each output, for --memory")
    data_dir: str = flag("", "folder of the benchmark's files, if it has moved since training")
    test_examples: int = flag(0, "test examples per task to score; 0: all")
    batch_size: int = flag(64, "examples per batch")
    beams: int = flag(1, "beams of beam search; 1 is greedy")
    device: str = flag("auto", "cpu, cuda, or auto: cuda where there is one", ("auto", "cpu", "cuda"))


if __name__ == "__main__":  # read the flags before the slow imports, so that --help and mistakes answer at once
    FLAGS = explicit_flags(Config, {})

import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

from choices import choose
from data import Example, Task, collate
from inject import adapted_layers, merged, task_ids
from metrics import score
from resume import advice_on_memory

OF_RUN, OF_MODEL = ("save", "data_dir", "test_examples"), ("batch_size", "beams", "device")
USES = {  # the other flags that a job looks at, by its own
    "count_parameters": ("backbone", "training_tasks"), "compare": (), "checkpoint": (*OF_RUN, *OF_MODEL),
    "memory": ("backbone", "training_tasks", "max_input", "max_output"),
    "zero_shot": ("checkpoint", "split", *OF_RUN, *OF_MODEL), "constant": ("checkpoint", "split", *OF_RUN),
}  # fmt: skip

# --- Predictions ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(
    model, tokenizer, examples: list[Example], ids: list[int], lengths, batch_size: int, beams: int = 1,
    by_choice: bool = False,
) -> list[str]:  # fmt: skip
    """The model's outputs for these examples, in their order: generated (greedily, or by beam search), or chosen.

    ids: the task id of each example. lengths: (max_input, max_output) in tokens. by_choice: the best of each example's
    choices, by `choices.choose`. The longest inputs go first, so that a batch holds like lengths. If there is one task
    in all, its adapter is merged for the time (not into bfloat16 weights, which would round it away).
    """
    was_training = model.training
    model.eval()
    if len(set(ids)) == 1 and model.dtype == torch.float32 and adapted_layers(model):
        with merged(model, ids[0]):
            outputs = predict(model, tokenizer, examples, ids, lengths, batch_size, beams, by_choice)
        model.train(was_training)
        return outputs
    order = sorted(range(len(examples)), key=lambda k: -len(examples[k].input))
    outputs, name = [""] * len(examples), "choose" if by_choice else "generate"
    for start in tqdm(range(0, len(order), batch_size), desc=name, unit="batch", disable=None, leave=False):
        rows = order[start : start + batch_size]
        batch = [examples[k] for k in rows]
        with task_ids([ids[k] for k in rows], keep=True):
            if by_choice:
                chosen = choose(model, tokenizer, batch, *lengths)
                texts = [example.choices[k] for example, k in zip(batch, chosen, strict=True)]
            else:
                texts = generate(model, tokenizer, batch, *lengths, beams)
        for k, text in zip(rows, texts, strict=True):
            outputs[k] = text
    model.train(was_training)
    return outputs


def generate(model, tokenizer, examples: list[Example], max_input: int, max_output: int, beams: int = 1) -> list[str]:
    """The outputs of one batch, within a `task_ids` context of its examples.

    Nothing of the backbone's own generation settings is used (facebook/bart-large's, for one, forbid an output to say
    three tokens twice).
    """
    encoder_decoder = model.config.is_encoder_decoder
    batch = collate(examples, None, tokenizer, encoder_decoder, max_input, max_output)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    plain = dict(no_repeat_ngram_size=0, repetition_penalty=1.0, length_penalty=1.0, early_stopping=False, min_length=0)
    out = model.generate(**batch, max_new_tokens=max_output, num_beams=beams, do_sample=False, **plain)
    out = out if encoder_decoder else out[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(out, skip_special_tokens=True)


def all_scores(
    model, tokenizer, tasks: list[Task], ids: list[int], lengths, limit: int = 0, batch_size: int = 64, beams: int = 1
) -> dict[str, dict[str, float]]:
    """Score each task on its test examples (the first `limit`; 0: all), tasks[k] under task id ids[k].

    Returns {task name: {metric: score}}, the task's main metric first. Examples of different tasks share batches: each
    still gets its own task's adapter. Raises UserError for a task without test examples.
    """
    chosen = {}
    for task in tasks:
        if not task.test:
            raise UserError(f"task {task.name} has no test examples to score")
        chosen[task.name] = task.test[: limit or None]
    scores = {}
    for by_choice in (False, True):
        kind = [(k, task) for k, task in zip(ids, tasks, strict=True) if (task.metric == "Rank-ACC") == by_choice]
        flat = [example for _, task in kind for example in chosen[task.name]]
        rows = [k for k, task in kind for _ in chosen[task.name]]
        outputs = iter(predict(model, tokenizer, flat, rows, lengths, batch_size, beams, by_choice))
        for _, task in kind:
            examples = chosen[task.name]
            predictions = [next(outputs) for _ in examples]
            scores[task.name] = {m: score(m, predictions, examples) for m in (task.metric, *task.also)}
    return {task.name: scores[task.name] for task in tasks}


def evaluate_tasks(*args, **kwargs) -> dict[str, float]:
    """`all_scores`, main metrics only: {task name: score}."""
    return main_scores(all_scores(*args, **kwargs))


def main_scores(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """What `all_scores` gives, main metrics only: {task name: score}."""
    return {name: next(iter(values.values())) for name, values in scores.items()}


def constant_scores(tasks: list[Task], limit: int = 0) -> dict[str, dict[str, float]]:
    """What a task's most frequent training answer scores on its test examples: a floor for any model.

    Where the task is scored by choosing, the answer is the place in the list of choices that is most often right.
    """
    scores = {}
    for task in tasks:
        test = task.test[: limit or None]
        if task.metric == "Rank-ACC":
            label = statistics.mode(e.label for e in task.train)
            predictions = [e.choices[min(label, len(e.choices) - 1)] for e in test]
        else:
            predictions = [statistics.mode(e.outputs[0] for e in task.train)] * len(test)
        scores[task.name] = {m: score(m, predictions, test) for m in (task.metric, *task.also)}
    return scores


def by_group(scores: dict[str, float], tasks: list[Task]) -> dict[str, float]:
    """The mean score of each group of tasks (SuperNI's categories, T0's data sets, CrossFit's types): {group: mean}."""
    groups = defaultdict(list)
    for task in tasks:
        if task.group:
            groups[task.group].append(scores[task.name])
    return {group: statistics.fmean(values) for group, values in sorted(groups.items())}


def mean(scores: dict[str, float]) -> float:
    """The unweighted mean over tasks."""
    return statistics.fmean(scores.values())


# --- The command ------------------------------------------------------------------------------------------------------


def evaluate(cfg: Config) -> dict[str, float]:
    """Score a run folder of train.py or adapt.py and print one line a task; returns {task name: main score}."""
    import adapt  # here: adapt.py and train.py import this file

    check_ranges(cfg)
    if cfg.save:
        refuse_save(Path(cfg.save))  # now, not after hours of scoring
    folder = Path(cfg.checkpoint)
    adapted = "checkpoint" in read_json(folder / "config.json")
    if adapted and (cfg.zero_shot or cfg.constant):
        flag = "--zero-shot" if cfg.zero_shot else "--constant"
        raise UserError(f"{flag} needs a run folder of train.py, this one is of adapt.py")
    score_run = _score_adapted if adapted else _score_held_out if cfg.zero_shot or cfg.constant else _score_pretrained
    with advice_on_memory("a smaller --batch-size", then=""):
        scores, tasks = score_run(cfg, folder, adapt)
    print_scores(scores, by_group(main_scores(scores), tasks))
    if cfg.save:
        write_json(Path(cfg.save), {"mean": mean(main_scores(scores)), "tasks": scores})
    return main_scores(scores)


def refuse_save(path: Path):
    """Raise UserError if a file is there already, or none can be made there: nothing is ever overwritten."""
    if path.exists():
        raise UserError(f"--save {path} exists: choose another name or delete it")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name):
            pass
    except OSError as error:
        raise UserError(f"--save {path} cannot be written: {error.strerror}") from None


def print_scores(scores: dict[str, dict[str, float]], groups: dict[str, float]):
    """One aligned line a task, with its metrics, then the means of groups where tasks have any, then the mean."""
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


def _run_config(cfg: Config, folder: Path, adapt):
    return adapt.train_config(adapt.Config(checkpoint=str(folder), data_dir=cfg.data_dir, device=cfg.device))


def _score_pretrained(cfg: Config, folder: Path, adapt):
    """The training tasks under their own rows of Z: (scores, tasks)."""
    base = _run_config(cfg, folder, adapt)
    tasks = adapt.train.load_tasks(base, base.split, ("train",)).train
    adapt.train.refuse_other_tasks(folder, base.method, tasks)
    ids = [t for t, task in enumerate(tasks) if task.test]
    if not ids:
        raise UserError(f"--checkpoint {folder}: its training tasks have no test examples")
    model, tokenizer = adapt.load_run(folder, base)
    scores, lengths = {}, (base.max_input, base.max_output)
    for few in (ids[k : k + 16] for k in range(0, len(ids), 16)):  # t0's 313 tasks have too many rows to hold at once
        some = [tasks[t] for t in few]
        scores |= all_scores(model, tokenizer, some, few, lengths, cfg.test_examples, cfg.batch_size, cfg.beams)
    return scores, [tasks[t] for t in ids]


def _score_held_out(cfg: Config, folder: Path, adapt):
    """The held-out tasks, under a fresh row of Z or by their most frequent answer: (scores, tasks)."""
    base = _run_config(cfg, folder, adapt)
    split = cfg.split or recipe(FEW_SHOT, base.dataset, base.method).get("split", "0")[0]
    tasks = adapt.choose_tasks(adapt.train.load_tasks(base, split, ("test",)), "all")
    if cfg.constant:
        tasks = [task for task in tasks if task.train and task.test]
        if not tasks:
            raise UserError("--constant: no held-out task has training and test examples here, leave the flag out")
        return constant_scores(tasks, cfg.test_examples), tasks
    torch.manual_seed(base.seed)  # a new task's embedding under HyperFormer is drawn
    model, tokenizer = adapt.load_run(folder, base)
    begin = adapt.prepare(model, base, adapt.Config(checkpoint=str(folder)))
    scores, lengths = {}, (base.max_input, base.max_output)
    for task in tqdm(tasks, desc="held-out tasks", unit="task", disable=None):
        begin(task)
        scores |= all_scores(model, tokenizer, [task], [0], lengths, cfg.test_examples, cfg.batch_size, cfg.beams)
    return scores, tasks


def _score_adapted(cfg: Config, folder: Path, adapt):
    """Every task of an adaptation run with the adapter that was saved for it, averaged over splits: (scores, tasks)."""
    run = read_config(adapt.Config, folder / "config.json")
    run = replace(run, data_dir=cfg.data_dir or run.data_dir, device=cfg.device)
    limit = cfg.test_examples or run.test_examples
    found, tasks = defaultdict(list), {}
    for _, task, model, tokenizer, lengths in adapt.load_adapted(run, folder):
        scores = all_scores(model, tokenizer, [task], [0], lengths, limit, cfg.batch_size, cfg.beams)
        found[task.name].append(scores[task.name])
        tasks[task.name] = task
    means = {
        name: {m: statistics.fmean(values[m] for values in several) for m in several[0]}
        for name, several in found.items()
    }
    return means, list(tasks.values())


# What may differ in a group of runs.
SAME_RUN = (
    "seed", "split", "checkpoint", "output_dir", "data_dir", "device", "precision", "log_every", "save_every",
    "keep_every", "resume", "deterministic",
)  # fmt: skip


def compare(folders: tuple[str, ...]) -> str:
    """One aligned table over finished run folders: a line for each group of runs that differ in seed and split only.

    Columns: what ran, data set, trained parameters (per task, for an adaptation), runs (each split of an adaptation
    counts as one), score before adaptation and score (mean over tasks, then mean +- standard deviation over runs),
    seconds. What is not the recipe's is in the first column. Folders without result.json are named below the table.
    Raises UserError if a folder does not exist, its files were changed, or none is of a finished run.
    """
    groups, unfinished = defaultdict(list), []
    for folder in map(Path, folders):
        if not folder.exists():
            raise UserError(f"--compare {folder} does not exist: give run folders")
        if not (folder / "result.json").is_file():
            unfinished.append(str(folder))
            continue
        try:
            label, dataset = name_of_run(folder)
            samples, trained = _samples(folder / "result.json")
            groups[label, dataset, trained] += samples
        except (KeyError, TypeError, AttributeError, RecursionError):  # RecursionError: a run that goes on from itself
            raise UserError(f"--compare {folder} is no run folder of this version") from None
    if not groups:
        raise UserError(f"--compare: give a finished run, there is none that has finished: {', '.join(unfinished)}")
    lines = [("run", "data set", "trained", "runs", "before", "score", "seconds")]
    for (label, dataset, trained), runs in sorted(groups.items()):
        before, after, seconds = ([v for v in column if v is not None] for column in zip(*runs, strict=True))
        columns = mean_std_text(before), mean_std_text(after), f"{statistics.fmean(seconds):.0f}"
        lines.append((label, dataset, f"{trained:,}", str(len(runs)), *columns))
    return aligned(lines) + (f"\nwithout result.json: {', '.join(unfinished)}" if unfinished else "")


def _samples(path: Path) -> tuple[list[tuple], int]:
    """What a result.json says: (score before, score, seconds) of a pre-training run, or of each split of an adaptation,
    and the number of trained parameters. Raises UserError for what is no number; KeyError, TypeError or AttributeError
    where it is not even in its place."""
    result = read_json(path)
    scores, seconds = result.get("mean"), result["seconds"]
    check_numbers(path, result["parameters"], {"seconds": seconds} | ({} if scores is None else {"mean": scores}))
    samples = [] if "splits" in result else [(None, scores, seconds)]
    for split in result.get("splits", {}).values():
        check_numbers(path, split["before"], split["tasks"])
        samples.append((mean(split["before"]), mean(split["tasks"]), seconds / len(result["splits"])))
    if not samples:
        raise KeyError("splits")
    return samples, sum(result["parameters"].values())


def name_of_run(folder: Path) -> tuple[str, str]:
    """(what ran, data set): method, heads, rank, variant, then every setting that is not the recipe's."""
    import adapt  # here: adapt.py and train.py import this file
    import train

    adapted = "checkpoint" in read_json(folder / "config.json")
    config = asdict(read_config(adapt.Config if adapted else train.Config, folder / "config.json"))
    base = asdict(read_config(train.Config, Path(config["checkpoint"]) / "config.json")) if adapted else config
    method, dataset = base["method"], base["dataset"]
    words = [name_of_run(Path(base["from_run"]))[0], f"-> {base['steps']} steps of"] if base["from_run"] else []
    words += [method]
    words += [f"h={base['heads']}"] if method == "mhr" else []
    words += [f"r={base['rank']}"] if method != "full" and base["adapter"] == "lora" else []
    words += [f"-> {config['variant']}"] if adapted else []
    shown = {"method", "dataset", "heads", "rank", "variant", *SAME_RUN, *(["skills"] if method in GIVEN else [])}
    adapter = dict(adapter=base["adapter"]) if method == "ia3" else {}
    if not base["from_run"]:  # else the label of that run has said it
        words += _changed(base, asdict(train.Config(**adapter)) | recipe(PRETRAINING, dataset, method), shown)
    if adapted:
        few = recipe(FEW_SHOT, dataset, "lora" if config["variant"] == "lora" else method)
        words += _changed(config, asdict(adapt.Config()) | few, shown)
    return " ".join(words), dataset


def _changed(config: dict, recipe: dict, shown: set[str]) -> list[str]:
    return [f"{k}={v}" for k, v in config.items() if k not in shown and v not in ("", recipe[k])]


def mean_std_text(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.fmean(values):.1f}" + (f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def over_splits(results: dict[str, dict]) -> dict:
    """Scores over splits. results: {split: what `adapt_split` returns}.

    mean_before, mean: over tasks, then over splits. std: of the splits' means (0 for one split). before, tasks, groups:
    {task or group: mean over the splits that have it}. medians: {task: median over splits}, and median, their mean:
    what the papers report for T0. splits: the results themselves.
    """

    def over(key: str, average=statistics.fmean) -> dict[str, float]:
        names = dict.fromkeys(name for result in results.values() for name in result[key])
        return {n: average([r[key][n] for r in results.values() if n in r[key]]) for n in names}

    means = [mean(result["tasks"]) for result in results.values()]
    medians = over("tasks", statistics.median)
    return {
        "mean_before": statistics.fmean(mean(result["before"]) for result in results.values()),
        "mean": statistics.fmean(means), "std": statistics.stdev(means) if len(means) > 1 else 0.0,
        "median": mean(medians), "before": over("before"), "tasks": over("tasks"), "medians": medians,
        "groups": over("groups"), "splits": results,
    }  # fmt: skip


def aligned(lines: list[tuple[str, ...]], left: int = 2) -> str:
    """Rows of cells to text: the first `left` columns on the left, numbers on the right."""
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    cells = [
        [c.ljust(w) if k < left else c.rjust(w) for k, (c, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def one_job(cfg, flags: dict, uses: dict[str, tuple[str, ...]]):
    """Refuse two jobs at a time (UserError), and say which of the given flags change nothing with the one. uses: for
    each flag that asks for a job the other flags that it looks at; one of those is no second job."""
    asked = [name for name in uses if getattr(cfg, name)]
    jobs = [name for name in asked if not any(name in uses[other] for other in asked)]
    shown = lambda name: f"--{name.replace('_', '-')}"  # noqa: E731
    if len(jobs) > 1:
        raise UserError(f"{shown(jobs[0])} and {shown(jobs[1])} are two jobs: give one of them")
    for job in jobs:
        if ignored := [shown(name) for name in flags if name not in (job, *uses[job])]:
            print(f"changes nothing with {shown(job)}: {', '.join(ignored)}")


def main(flags: dict):
    """Score one run, compare several, or count parameters. Raises UserError if nothing is asked for, or two of them."""
    cfg = Config(**flags)
    check_ranges(cfg)
    one_job(cfg, flags, USES)
    if cfg.count_parameters:
        from counts import table  # here: it imports train.py and adapt.py, which import this file

        print(aligned(table(cfg.backbone, cfg.training_tasks)))
    elif cfg.memory:
        import memory  # here: as counts

        lengths = (cfg.max_input, cfg.max_output)
        print(aligned(memory.table(cfg.backbone, cfg.memory, lengths, cfg.training_tasks), left=1))
    elif cfg.compare:
        print(compare(tuple(cfg.compare)))
    elif cfg.checkpoint:
        evaluate(cfg)
    else:
        raise UserError("give --checkpoint RUN to score a run, or --compare RUN RUN ... to compare runs")


if __name__ == "__main__":
    exit_on_user_error(main, FLAGS)
