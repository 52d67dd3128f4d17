"""Scores: predict, generate or choose, score each task by its own metric, average over groups and splits."""

import statistics
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from benchmarks.choices import choose
from benchmarks.metrics import score, score_one
from data import Example, Task, collate
from inject import adapted_layers, is_whole, merged, task_ids
from plumbing import processes
from plumbing.errors import UserError
from plumbing.folders import write_lines
from plumbing.large import is_sharded

# --- Predictions ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(
    model, tokenizer, examples: list[Example], ids: list[int], lengths, batch_size: int, beams: int = 1,
    by_choice: bool = False,
) -> list[tuple[str, list[float]]]:  # fmt: skip
    """The model's outputs for these examples, in their order: generated (greedily, or by beam search), or chosen; each
    with the scores of the example's choices ([] where it is generated).

    ids: the task id of each example. lengths: (max_input, max_output) in tokens. by_choice: the best of each example's
    choices, by `benchmarks.choices.choose`. The longest inputs go first, so that a batch holds similar lengths. If all
    examples are of one task, its adapter is merged meanwhile (not into bfloat16 weights, which would round it away, nor
    into those that are not whole).
    """
    was_training = model.training
    model.eval()
    weights = [layer.linear.weight for layer in adapted_layers(model).values()]
    if len(set(ids)) == 1 and weights and all(w.dtype == torch.float32 and is_whole(w) for w in weights):
        with merged(model, ids[0]):
            outputs = predict(model, tokenizer, examples, ids, lengths, batch_size, beams, by_choice)
        model.train(was_training)
        return outputs
    order = sorted(range(len(examples)), key=lambda k: -len(examples[k].input))
    outputs, name = [None] * len(examples), "choose" if by_choice else "generate"
    for start in tqdm(range(0, len(order), batch_size), desc=name, unit="batch", disable=None, leave=False, delay=2):
        rows = order[start : start + batch_size]
        batch = [examples[k] for k in rows]
        with task_ids([ids[k] for k in rows], keep=True):
            if by_choice:
                chosen, scores = choose(model, tokenizer, batch, *lengths)
                texts = [example.choices[k] for example, k in zip(batch, chosen, strict=True)]
            else:
                texts, scores = generate(model, tokenizer, batch, *lengths, beams), [[]] * len(batch)
        for k, *output in zip(rows, texts, scores, strict=True):
            outputs[k] = tuple(output)
    model.train(was_training)
    return outputs


def generate(model, tokenizer, examples: list[Example], max_input: int, max_output: int, beams: int = 1) -> list[str]:
    """The outputs of one batch, within a `task_ids` context of its examples.

    The backbone's own generation settings are put aside: those of facebook/bart-large, for one, forbid to repeat any
    three tokens. An output begins and ends with the tokens that training taught.
    """
    encoder_decoder = model.config.is_encoder_decoder
    batch = collate(examples, None, tokenizer, encoder_decoder, max_input, max_output)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    own = model.generation_config
    begin = getattr(model.config, "decoder_start_token_id", None)
    model.generation_config = GenerationConfig(  # not as an argument, which the model's own settings would complete
        eos_token_id=tokenizer.eos_token_id, bos_token_id=own.bos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        decoder_start_token_id=own.decoder_start_token_id if begin is None else begin,
    )  # fmt: skip
    plain = dict(do_sample=False, length_penalty=1.0, early_stopping=False)
    plain |= {"synced_gpus": True} if is_sharded(model) else {}  # processes that share a backbone stop together
    try:
        out = model.generate(**batch, max_new_tokens=max_output, num_beams=beams, **plain)
    finally:
        model.generation_config = own
    out = out if encoder_decoder else out[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(out, skip_special_tokens=True)


# --- Scores of tasks --------------------------------------------------------------------------------------------------


def all_scores(
    model, tokenizer, tasks: list[Task], ids: list[int], lengths, limit: int = 0, batch_size: int = 64, beams: int = 1,
    lines: list | None = None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Score each task on its test examples (the first `limit`; 0: all), tasks[k] under task id ids[k].

    Returns {task name: {metric: score}}, the task's main metric first. Examples of different tasks share batches: each
    still gets its own task's adapter. lines: a list that gets `line_of` each example, for predictions.jsonl. Raises
    UserError for a task without test examples.
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
            scores[task.name] = scores_of(task, [text for text, _ in predictions], examples)
            if lines is not None:
                lines += [line_of(task, e, *output) for e, output in zip(examples, predictions, strict=True)]
    return {task.name: scores[task.name] for task in tasks}


def scores_of(task: Task, outputs: list[str], examples: list[Example]) -> dict[str, float]:
    """{metric: score} of these outputs for examples of a task, its main metric first."""
    return {metric: score(metric, outputs, examples) for metric in (task.metric, *task.also)}


def line_of(task: Task, example: Example, output: str, scores: list[float]) -> dict:
    """A scored example as a line of predictions.jsonl. scores: of its choices, [] if the output was generated."""
    line = {"task": task.name, "input": example.input, "references": list(example.outputs)}
    line |= {"output": output, "score": round(score_one(task.metric, output, example), 4)}
    if scores:
        line |= {"choices": list(example.choices), "label": example.label}
        line["choice_scores"] = [round(s, 4) for s in scores]
    return line


def evaluate_tasks(*args, **kwargs) -> dict[str, float]:
    """`all_scores`, main metrics only: {task name: score}."""
    return main_scores(all_scores(*args, **kwargs))


def main_scores(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """What `all_scores` gives, main metrics only: {task name: score}."""
    return {name: next(iter(values.values())) for name, values in scores.items()}


def constant_scores(tasks: list[Task], limit: int = 0) -> dict[str, dict[str, float]]:
    """The score of each task's most frequent training answer on its test examples: a floor for any model.

    For a task that is scored by choosing, the answer is the position in the list of choices that is most often right.
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


def tasks_to_score(cfg, tasks: list[Task]) -> list[int]:
    """The numbers of the training tasks to score at the end. Raises UserError if --eval-examples finds none."""
    numbers = [t for t, task in enumerate(tasks) if task.test] if cfg.eval_examples else []
    if cfg.eval_examples and not numbers:
        raise UserError(f"--eval-examples {cfg.eval_examples}: no training task has test examples")
    return numbers


def score_training_tasks(model, tokenizer, tasks: list[Task], numbers: list[int], cfg, folder: Path) -> dict:
    """{"mean", "tasks": {name: main score}, "metrics": {name: metric}} of the training tasks with these numbers; {} if
    there are none. Writes predictions.jsonl to the run folder."""
    if not numbers:
        return {}
    mine, lengths, lines = numbers if cfg.shard else processes.share(numbers), (cfg.max_input, cfg.max_output), []
    own = all_scores(model, tokenizer, [tasks[t] for t in mine], mine, lengths, cfg.eval_examples, lines=lines)
    of_task = {name: [{"split": "", **line} for line in lines if line["task"] == name] for name in own}
    every = processes.together({name: (score, of_task[name]) for name, score in main_scores(own).items()})
    scores = {tasks[t].name: every[tasks[t].name][0] for t in numbers}
    if processes.first():
        write_lines(folder / "predictions.jsonl", [line for name in scores for line in every[name][1]])
    print(f"training tasks, {cfg.eval_examples} unseen examples each: mean score {mean(scores):.1f}")
    return {"mean": mean(scores), "tasks": scores, "metrics": {tasks[t].name: tasks[t].metric for t in numbers}}


# --- Means ------------------------------------------------------------------------------------------------------------


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


def of_split(results: dict[str, dict], tasks: list[Task]) -> dict:
    """The scores of one split, from the results that `plumbing.tasks.TaskRun` recorded.

    {"before", "tasks": {task: main score}, "groups": {group: mean}, "metrics": {task: {metric: score}}, "stops"}.
    """
    before, metrics, stops = ({t.name: results[t.name][key] for t in tasks} for key in ("before", "metrics", "stops"))
    after = main_scores(metrics)
    return {"before": before, "tasks": after, "groups": by_group(after, tasks), "metrics": metrics, "stops": stops}


def over_splits(results: dict[str, dict]) -> dict:
    """Scores over splits. results: {split: what `of_split` returns}.

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


def summary(result: dict, number: int) -> str:
    """One line about a whole adaptation. result: from `over_splits`. number: how many tasks."""
    splits, before, after = len(result["splits"]), result["mean_before"], result["mean"]
    spread = f", mean of {splits} splits (std {result['std']:.1f}, median {result['median']:.1f})" if splits > 1 else ""
    return f"mean score of {number} held-out tasks: before adaptation {before:.1f}, after {after:.1f}{spread}"
