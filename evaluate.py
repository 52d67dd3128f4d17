"""Evaluation: generate, score by each task's own metric, compare runs.

python evaluate.py --checkpoint runs/NAME            score a run again (a pre-training run: its training tasks'
                                                     test examples; an adaptation run: its adapted tasks)
python evaluate.py --checkpoint runs/NAME --zero-shot   a pre-training run on the held-out tasks, as it is
python evaluate.py --compare runs/*                  one table over run folders, seeds as mean +- std
"""

import string
from dataclasses import asdict, dataclass, replace

from config import (
    FEW_SHOT, PRETRAINING, UserError, check_ranges, exit_on_user_error, explicit_flags, flag, read_config, read_json,
    recipe,
)  # fmt: skip


@dataclass
class Config:
    """Score a run, or compare runs."""

    checkpoint: str = flag("", "run folder of train.py or adapt.py to score")
    zero_shot: bool = flag(False, "score a pre-training run on the held-out tasks without adaptation")
    compare: tuple = flag((), "run folders to compare in one table, instead of scoring")
    data_dir: str = flag("", "folder of the benchmark's files, if it has moved since training")
    batch_size: int = flag(64, "examples per batch")
    beams: int = flag(1, "beams of beam search; 1 is greedy")
    device: str = flag("cpu", "cpu or cuda", ("cpu", "cuda"))


if __name__ == "__main__":  # read the flags before the slow imports, so that --help and mistakes answer at once
    FLAGS = explicit_flags(Config, {})

import math
import re
import statistics
from collections import Counter, defaultdict
from pathlib import Path

import torch
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import pearsonr
from sklearn.metrics import f1_score, matthews_corrcoef
from tqdm import tqdm

import data
from data import Example, Task, collate
from inject import task_ids

# --- Metrics ----------------------------------------------------------------------------------------------------------
# CrossFit's seven metrics, and plain equality for strings. Each takes predictions (strings), references (one tuple of
# strings per example), and returns a number times 100. Predictions and references are stripped of surrounding white
# space first. Deviation: Rouge-L is computed by rouge-score, the scorer of SuperNI, where CrossFit calls the older
# "rouge" package.


def _normal(text: str) -> list[str]:
    """SQuAD's normalisation: lower case, no punctuation, no articles, split at white space."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _token_f1(prediction: str, reference: str) -> float:
    p, r = _normal(prediction), _normal(reference)
    common = sum((Counter(p) & Counter(r)).values())
    return 2 * common / (len(p) + len(r)) if common else 0.0


def _best(score):
    """A metric that averages over examples the best score over an example's references."""
    return lambda predictions, references: (
        100 * statistics.fmean(max(score(p, r) for r in rs) for p, rs in zip(predictions, references, strict=True))
    )


def _classification_f1(predictions, references) -> float:
    """Macro F1 over the strings of first references and predictions: a word that is no label is a class of its own."""
    return 100 * float(f1_score([rs[0] for rs in references], predictions, average="macro", zero_division=0))


def _matthews(predictions, references) -> float:
    """Matthews correlation of "acceptable" against everything else (CoLA)."""
    gold, guess = [rs[0] == "acceptable" for rs in references], [p == "acceptable" for p in predictions]
    return 100 * float(matthews_corrcoef(gold, guess))


def _pearson(predictions, references) -> float:
    """Pearson correlation of outputs read as numbers; 0 where it is not defined (no number, or all the same)."""
    try:
        guess, gold = [float(p) for p in predictions], [float(rs[0]) for rs in references]
    except ValueError:
        return 0.0
    defined = len(set(guess)) > 1 and len(set(gold)) > 1 and all(map(math.isfinite, guess))
    return 100 * float(pearsonr(gold, guess).statistic) if defined else 0.0


_rouge = RougeScorer(["rougeL"], use_stemmer=True)
METRICS = {
    "exact": _best(lambda p, r: float(p == r)),  # strings: there, case is part of the answer
    "EM": _best(lambda p, r: float(_normal(p) == _normal(r))),
    "ACC": _best(lambda p, r: float(p.lower() == r.lower())),
    "QA-F1": _best(_token_f1),
    "Rouge-L": _best(lambda p, r: _rouge.score(r, p)["rougeL"].fmeasure),
    "Classification-F1": _classification_f1,
    "Matthew-Correlation": _matthews,
    "Pearson-Correlation": _pearson,
}


def score(metric: str, predictions: list[str], examples: list[Example]) -> float:
    """Score predictions by a key of METRICS, times 100. Raises ValueError if there are no examples."""
    if not examples:
        raise ValueError("nothing to score: no examples")
    references = [tuple(output.strip() for output in e.outputs) for e in examples]
    return METRICS[metric]([p.strip() for p in predictions], references)


# --- Generation -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(model, tokenizer, examples: list[Example], ids: list[int], lengths, batch_size: int, beams: int = 1):
    """The model's outputs for these examples, a list of strings in their order. Greedy, or beam search.

    ids: the task id of each example. lengths: (max_input, max_output) in tokens. The longest inputs go first, so that
    a batch holds like lengths.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(examples)), key=lambda k: -len(examples[k].input))
    encoder_decoder, (max_input, max_output) = model.config.is_encoder_decoder, lengths
    predictions = [""] * len(examples)
    for start in tqdm(range(0, len(order), batch_size), desc="generate", unit="batch", disable=None, leave=False):
        rows = order[start : start + batch_size]
        batch = collate([examples[k].input for k in rows], None, tokenizer, encoder_decoder, max_input, max_output)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with task_ids([ids[k] for k in rows]):
            out = model.generate(**batch, max_new_tokens=max_output, num_beams=beams, do_sample=False)
        out = out if encoder_decoder else out[:, batch["input_ids"].shape[1] :]
        for k, text in zip(rows, tokenizer.batch_decode(out, skip_special_tokens=True), strict=True):
            predictions[k] = text
    model.train(was_training)
    return predictions


def evaluate_tasks(
    model, tokenizer, tasks: list[Task], ids: list[int], lengths, limit: int = 0, batch_size: int = 64, beams: int = 1
) -> dict[str, float]:
    """Score each task on its test examples (the first `limit`; 0: all), tasks[k] under task id ids[k].

    Returns {task name: score}. Examples of different tasks share batches: each still gets its own task's adapter.
    Raises UserError for a task without test examples.
    """
    chosen = [task.test[: limit or None] for task in tasks]
    for task in tasks:
        if not task.test:
            raise UserError(f"task {task.name} has no test examples to score")
    rows = [task_id for task_id, examples in zip(ids, chosen, strict=True) for _ in examples]
    flat = [example for examples in chosen for example in examples]
    predictions = iter(generate(model, tokenizer, flat, rows, lengths, batch_size, beams))
    return {
        task.name: score(task.metric, [next(predictions) for _ in examples], examples)
        for task, examples in zip(tasks, chosen, strict=True)
    }


def mean(scores: dict[str, float]) -> float:
    """The unweighted mean over tasks."""
    return statistics.fmean(scores.values())


# --- The command ------------------------------------------------------------------------------------------------------


def evaluate(cfg: Config) -> dict[str, float]:
    """Score a run folder of train.py or adapt.py and print one line a task; returns {task name: score}."""
    import adapt  # here: adapt.py and train.py import this file
    import train

    check_ranges(cfg)
    folder = Path(cfg.checkpoint)
    if "checkpoint" in read_json(folder / "config.json"):
        if cfg.zero_shot:
            raise UserError("--zero-shot needs a run folder of train.py, this one is of adapt.py")
        scores = _score_adapted(cfg, folder, adapt)
    else:
        scores = _score_pretrained(cfg, folder, adapt, train)
    width = max(len(name) for name in scores)
    for name, value in scores.items():
        print(f"{name:{width}}  {value:5.1f}")
    print(f"{'mean':{width}}  {mean(scores):5.1f}")
    return scores


def _score_pretrained(cfg: Config, folder: Path, adapt, train) -> dict[str, float]:
    """The training tasks under their own rows of Z, or (zero-shot) the held-out ones under a fresh row."""
    base = adapt.train_config(adapt.Config(checkpoint=str(folder), data_dir=cfg.data_dir, device=cfg.device))
    benchmark = data.load(base.dataset, base.data_dir, base.split, base.instructions)
    model, tokenizer = adapt.load_run(folder, base, len(benchmark.train))
    tasks, ids = benchmark.train, list(range(len(benchmark.train)))
    if cfg.zero_shot:
        tasks, ids = adapt.choose_tasks(benchmark, "all"), [0] * len(benchmark.test)
        adapt.prepare(model, "all", base.adapter)
    lengths = base.max_input, base.max_output
    return evaluate_tasks(model, tokenizer, tasks, ids, lengths, 0, cfg.batch_size, cfg.beams)


def _score_adapted(cfg: Config, folder: Path, adapt) -> dict[str, float]:
    """Every task of an adaptation run with the adapter that was saved for it."""
    run = read_config(adapt.Config, folder / "config.json")
    run = replace(run, data_dir=cfg.data_dir or run.data_dir, device=cfg.device)
    scores = {}
    for task, model, tokenizer, lengths in adapt.load_adapted(run, folder):
        scores |= evaluate_tasks(model, tokenizer, [task], [0], lengths, run.test_examples, cfg.batch_size, cfg.beams)
    return scores


SAME_RUN = ("seed", "split", "checkpoint", "output_dir", "data_dir", "device", "log_every")  # may differ in a group


def compare(folders: tuple[str, ...]) -> str:
    """One aligned table over finished run folders: a line for each group of runs that differ in seed and split only.

    Columns: what ran, data set, trained parameters (per task, for an adaptation), runs, score before adaptation and
    score (mean over tasks, then mean +- standard deviation over runs), seconds. What is not the recipe's is in the
    first column. Folders without result.json are named below the table.
    """
    groups, unfinished = defaultdict(list), []
    for folder in map(Path, folders):
        if not (folder / "result.json").is_file():
            unfinished.append(str(folder))
            continue
        try:
            label, dataset = _label(folder)
            result = read_json(folder / "result.json")
            trained = sum(result["parameters"].values())
            groups[label, dataset, trained].append([result.get(k) for k in ("mean_before", "mean", "seconds")])
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"--compare {folder} is no run folder of this version") from None
    lines = [("run", "data set", "trained", "runs", "before", "score", "seconds")]
    for (label, dataset, trained), runs in sorted(groups.items()):
        before, after, seconds = ([v for v in column if v is not None] for column in zip(*runs, strict=True))
        columns = _mean_std(before), _mean_std(after), f"{statistics.fmean(seconds):.0f}"
        lines.append((label, dataset, f"{trained:,}", str(len(runs)), *columns))
    return _aligned(lines) + (f"\nwithout result.json: {', '.join(unfinished)}" if unfinished else "")


def _label(folder: Path) -> tuple[str, str]:
    """(what ran, data set): method, heads, rank, variant, then every setting that is not the recipe's."""
    import adapt  # here: adapt.py and train.py import this file
    import train

    config = read_json(folder / "config.json")
    adapted = "checkpoint" in config
    base = read_json(Path(config["checkpoint"]) / "config.json") if adapted else config
    method, dataset = base["method"], base["dataset"]
    words = [method]
    words += [f"h={base['heads']}"] if method == "mhr" else []
    words += [f"r={base['rank']}"] if method != "full" and base["adapter"] == "lora" else []
    words += [f"-> {config['variant']}"] if adapted else []
    shown = {"method", "dataset", "heads", "rank", "variant", *SAME_RUN}
    words += _changed(
        base,
        asdict(train.Config(adapter=base["adapter"] if method == "ia3" else "lora"))
        | recipe(PRETRAINING, dataset, method),
        shown,
    )
    words += _changed(config, asdict(adapt.Config()) | recipe(FEW_SHOT, dataset, method), shown) if adapted else []
    return " ".join(words), dataset


def _changed(config: dict, recipe: dict, shown: set[str]) -> list[str]:
    return [f"{k}={v}" for k, v in config.items() if k not in shown and v != recipe[k]]


def _mean_std(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.fmean(values):.1f}" + (f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def _aligned(lines: list[tuple[str, ...]]) -> str:
    """Rows of cells to text: the first two columns on the left, numbers on the right."""
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    cells = [
        [c.ljust(w) if k < 2 else c.rjust(w) for k, (c, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def main(flags: dict):
    """Score one run, or compare several. Raises UserError if neither is asked for."""
    cfg = Config(**flags)
    if cfg.compare:
        print(compare(tuple(cfg.compare)))
    elif cfg.checkpoint:
        evaluate(cfg)
    else:
        raise UserError("give --checkpoint RUN to score a run, or --compare RUN RUN ... to compare runs")


if __name__ == "__main__":
    exit_on_user_error(main, FLAGS)
