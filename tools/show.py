r"""Print scored examples of a run: what the model wrote, and where it was wrong.

    python -m tools.show runs/NAME                                   a line for each task: a collapsed model is seen
    python -m tools.show runs/NAME --task TASK --worst 3 --best 3    the worst and the best examples of a task

Reads predictions.jsonl of a run folder of train.py or adapt.py, or a file X.predictions.jsonl: of an evaluation, or
before.predictions.jsonl of adapt.py, the same examples before adaptation.

Scores are those of single examples under the task's main metric. The mean of them is the score of the task, but where
the metric is one of all examples together, as a correlation. Line breaks, control and invisible characters are printed
as \n, \x1b, \u200b; a backslash as two.
"""

from dataclasses import dataclass

from plumbing.errors import UserError, exit_on_user_error, tell
from plumbing.flags import check_ranges, explicit_flags, flag


@dataclass
class Config:
    """Print scored examples of a run: a line for each task, or examples of one.

    examples:
      python -m tools.show runs/strings-mhr-0-all
      python -m tools.show runs/strings-mhr-0-all --task sort+swap --worst 3
    """

    run: str = flag("", "run folder, or a file X.predictions.jsonl", metavar="RUN_OR_FILE", positional=True)
    task: str = flag("", "print examples of this task, choices with their log-probabilities")
    worst: int = flag(1, "how many of those with the lowest scores")
    best: int = flag(1, "how many of those with the highest scores")
    split: str = flag("", "only the examples of this split of adapt.py; none: of all", metavar="SPLIT")


if __name__ == "__main__":  # as in the other commands
    FLAGS = explicit_flags(Config, {})

import difflib
import json
import statistics
import sys
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from plumbing.tables import aligned, columns, visible, wrapped

PREDICTIONS = "predictions.jsonl"  # in a run folder
OFTEN = 0.2  # the most frequent output is shown if its share is above this
WIDTH, LINES = 80, 8  # of a text as it is printed

# --- Reading ----------------------------------------------------------------------------------------------------------


def predictions_file(run: str) -> Path:
    """The file to read for a run folder or file. Raises UserError if there is none."""
    path = Path(run)
    if not path.exists():
        raise UserError(f"{run} does not exist: give a run folder, or a file X.predictions.jsonl of evaluate.py")
    if path.is_dir() and not (path / PREDICTIONS).is_file():
        why = f"{run} holds no {PREDICTIONS} (it has not finished, scored no task, or is of an earlier version)"
        raise UserError(f"{why}: evaluate.py --checkpoint {run} --save X.json writes X.predictions.jsonl")
    return path / PREDICTIONS if path.is_dir() else path


def read_examples(path: Path) -> Iterator[dict]:
    """The scored examples of a file, one a line. Lines of evaluate.py with the settings or "done" are skipped.

    Raises UserError for a damaged line, or if the file cannot be read.
    """
    number = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                example = json.loads(line.decode())
                if "done" not in example and (number > 1 or "checkpoint" not in example):
                    check(example)
                    yield example
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}:{number} is no scored example: give the file as the run wrote it") from None


def check(example: dict):
    """Raise KeyError, TypeError or ValueError for an example that no run writes."""
    of_choice = "choices" in example
    texts = [*(example[name] for name in ("split", "task", "input", "output")), *example["references"]]
    texts += example["choices"] if of_choice else []
    numbers = [example["score"], *(example["choice_scores"] if of_choice else ())]
    known = all(isinstance(example.get(name, []), list) for name in ("references", "choices", "choice_scores"))
    if not known or not all(isinstance(text, str) for text in texts):
        raise TypeError
    if not all(type(x) is float or type(x) is int and abs(x) < 1e15 for x in numbers) or not abs(numbers[0]) < 1e15:
        raise ValueError  # a log-probability may be infinite, or none at all: of a model that has broken down
    if of_choice and (len(numbers) - 1 != len(example["choices"]) or example["label"] not in range(len(numbers) - 1)):
        raise ValueError


def of_split(path: Path, split: str) -> Iterator[dict]:
    """The examples of one split; "": of all. Raises UserError if there are none."""
    splits = {}
    for example in read_examples(path):
        splits[example["split"]] = True
        if split in ("", example["split"]):
            yield example
    if not splits:
        raise UserError(f"{path} holds no examples: score the run by evaluate.py --save X.json")
    if split and split not in splits:
        names = ", ".join(visible(name) for name in splits if name)
        raise UserError(f"--split {split} is none of {path}: " + (f"choose from {names}" if names else "leave it out"))


def of_task(examples: Iterable[dict], task: str, path: Path) -> list[dict]:
    """The examples of one task. Raises UserError, with names that are near, if there are none."""
    found, names = [], {}
    for example in examples:
        names[example["task"]] = True
        if example["task"] == task:
            found.append(example)
    if not found:
        near = [name for name in names if task in name][:3] or difflib.get_close_matches(task, names)
        advice = f"do you mean {' or '.join(near)}?" if near else f"choose from {', '.join(list(names)[:5])}"
        raise UserError(f"--task {visible(task)} is no task of {path}: {visible(advice)}")
    return found


# --- One line a task --------------------------------------------------------------------------------------------------


def overview(examples: Iterable[dict]) -> str:
    """A table: for each task the number of examples, mean score, share of empty outputs, mean length of an output in
    characters, and the most frequent output if it is frequent. Blank outputs are empty, as they are for the metrics."""
    scores, outputs = defaultdict(list), defaultdict(Counter)
    for example in examples:
        scores[example["task"]].append(example["score"])
        outputs[example["task"]][example["output"]] += 1
    lines, frequent = [("task", "examples", "score", "empty", "characters")], []
    for task, counts in outputs.items():
        n, ((output, times),) = counts.total(), counts.most_common(1)
        empty = sum(times for output, times in counts.items() if not output.strip()) / n
        length = sum(times * len(output) for output, times in counts.items()) / n
        score = statistics.fmean(scores[task])
        lines.append((visible(task), str(n), f"{score:.1f}", percent(empty), f"{length:.1f}"))
        frequent.append((times / n, output))
    header, *table = aligned(lines, left=1).split("\n")
    room = max(20, 100 - columns(header) - 9)
    often = [f"{percent(s):>5}  {shortened(output, room)}" if s > OFTEN else "" for s, output in frequent]
    ends = ["most frequent output", *often]
    return "\n".join(f"{line}  {end}".rstrip() for line, end in zip((header, *table), ends, strict=True))


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def shortened(text: str, width: int) -> str:
    """The beginning of a text in at most `width` columns."""
    if columns(whole := printed(text)) <= width:
        return whole
    return wrapped(whole, width - 3)[0] + "..."


# --- Single examples --------------------------------------------------------------------------------------------------


def printed(text: str) -> str:
    """A text as it is printed, so that nothing in it is invisible."""
    return visible(text.replace("\\", "\\\\")) if text.strip(" ") else "(only spaces)" if text else "(empty)"


def lines_of(text: str, width: int) -> list[str]:
    """The lines of a text as it is printed. Of more than LINES only the first and last are left, and how many
    characters there were between them."""
    lines = wrapped(printed(text), width)
    if len(lines) <= LINES:
        return lines
    count, sizes = LINES // 2, range(min(len(text), LINES * width))
    begin, end = (
        bisect_right(sizes, count, key=lambda n: len(wrapped(printed(part(n)), width))) - 1  # noqa: B023
        for part in (lambda n: text[:n], lambda n: text[len(text) - n :])
    )
    if begin + end >= len(text):
        return lines
    between = f"[... {len(text) - begin - end:,} characters left out ...]"
    return [*wrapped(printed(text[:begin]), width), between, *wrapped(printed(text[len(text) - end :]), width)]


def as_text(example: dict, rank: str) -> str:
    """One example as it is printed; choices after their log-probabilities. rank: worst or best."""
    split = f", split {visible(example['split'])}" if example["split"] else ""
    parts = [("input", "", example["input"]), *(("reference", "", text) for text in example["references"])]
    parts.append(("output", "", example["output"]))
    for k, choice in enumerate(example.get("choices", ())):
        marks = ["right"] * (k == example["label"]) + ["chosen"] * (choice == example["output"])
        parts.append((", ".join(marks) or "choice", f" {example['choice_scores'][k]:8.3f}  ", choice))
    lines = [f"{rank} of {visible(example['task'])}{split}: score {example['score']:.1f}"]
    for label, number, text in parts:
        begin = f"  {label:13}{number}"
        for line in lines_of(text, WIDTH - len(begin)):
            lines.append((begin + line).rstrip())
            begin = " " * len(begin)
    return "\n".join(lines)


def worst_and_best(examples: list[dict], worst: int, best: int) -> list[str]:
    """These many examples with the lowest and the highest scores as texts; none of them twice."""
    ranked = sorted(examples, key=lambda example: example["score"])
    last = ranked[max(worst, len(ranked) - best) :]
    return [as_text(e, "worst") for e in ranked[:worst]] + [as_text(e, "best") for e in reversed(last)]


def main(flags: dict):
    cfg = Config(**flags)
    check_ranges(cfg)
    if not cfg.task and (alone := [name for name in ("worst", "best") if name in flags]):
        raise UserError(f"--{alone[0]} needs --task: name the task whose examples to print")
    path = predictions_file(cfg.run)
    examples = of_split(path, cfg.split)
    if cfg.task:
        examples = of_task(examples, cfg.task, path)
    texts = [overview(examples), *(worst_and_best(examples, cfg.worst, cfg.best) if cfg.task else ())]
    sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal without the characters of a text
    tell("\n\n".join(texts))


if __name__ == "__main__":
    exit_on_user_error(main, FLAGS)
