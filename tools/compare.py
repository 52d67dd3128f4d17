"""Compare runs: one table over run folders, seeds as mean +- standard deviation.

    python -m tools.compare runs/*

Runs that differ in their seed or split only share a line.
"""

from dataclasses import dataclass

from plumbing.errors import UserError, exit_on_user_error
from plumbing.flags import explicit_flags, flag
from plumbing.folders import check_numbers, read_config, read_json, script_of
from plumbing.tables import aligned, mean_std_text
from recipes import FEW_SHOT, FIXED_TABLE, PRETRAINING, recipe


@dataclass
class Config:
    """Compare runs in one table: a line for each group of runs that differ in seed and split only.

    example:
      python -m tools.compare runs/strings-*
    """

    runs: tuple = flag((), "run folder of train.py or adapt.py", metavar="RUN", positional=True)


if __name__ == "__main__":  # read the flags before the slow imports: --help and mistakes answer at once
    FLAGS = explicit_flags(Config, {})

import statistics
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import adapt
import train
from scoring import mean

# Settings that may differ in a group of runs.
MAY_DIFFER = (
    "seed", "split", "checkpoint", "output_dir", "data_dir", "device", "precision", "log_every", "save_every",
    "keep_every", "deterministic",
)  # fmt: skip


def compare(folders: tuple[str, ...]) -> str:
    """One aligned table over finished run folders: a line for each group of runs that differ in seed and split only.

    Columns: what ran, with settings that differ from the recipe; data set; trained parameters (per task, for an
    adaptation); runs (each split of an adaptation counts as one); score before adaptation and score (mean over tasks,
    then mean +- standard deviation over runs); seconds. Folders without result.json are named below the table.
    Raises UserError if a folder does not exist, its files were changed, or none is of a finished run.
    """
    groups, unfinished = defaultdict(list), []
    for folder in map(Path, folders):
        if not folder.exists():
            raise UserError(f"{folder} does not exist: give run folders")
        if not (folder / "result.json").is_file():
            unfinished.append(str(folder))
            continue
        try:
            label, dataset = name_of_run(folder)
            samples, trained = _samples(folder / "result.json")
            groups[label, dataset, trained] += samples
        except (KeyError, TypeError, AttributeError, RecursionError):  # RecursionError: a run that continues itself
            raise UserError(f"{folder} is no run folder of this version") from None
    if not groups:
        raise UserError(f"give a finished run, none of these has finished: {', '.join(unfinished)}")
    lines = [("run", "data set", "trained", "runs", "before", "score", "seconds")]
    for (label, dataset, trained), runs in sorted(groups.items()):
        before, after, seconds = ([v for v in column if v is not None] for column in zip(*runs, strict=True))
        columns = mean_std_text(before), mean_std_text(after), f"{statistics.fmean(seconds):.0f}"
        lines.append((label, dataset, f"{trained:,}", str(len(runs)), *columns))
    return aligned(lines) + (f"\nwithout result.json: {', '.join(unfinished)}" if unfinished else "")


def _samples(path: Path) -> tuple[list[tuple], int]:
    """(score before, score, seconds) of a pre-training run, or of each split of an adaptation; the number of trained
    parameters. path: the result.json of the run.

    Raises UserError for a value that is no number; KeyError, TypeError or AttributeError if it is missing.
    """
    result, adapted = read_json(path), script_of(path.parent) == "adapt.py"
    scores, seconds = result.get("mean"), result["seconds"]
    check_numbers(path, result["parameters"], {"seconds": seconds} | ({} if scores is None else {"mean": scores}))
    samples = [] if adapted else [(None, scores, seconds)]
    for split in result["splits"].values() if adapted else ():
        check_numbers(path, split["before"], split["tasks"])
        samples.append((mean(split["before"]), mean(split["tasks"]), seconds / len(result["splits"])))
    if not samples:
        raise KeyError("splits")
    return samples, sum(result["parameters"].values())


def name_of_run(folder: Path) -> tuple[str, str]:
    """(what ran, data set): method, heads, rank, variant, then every setting that differs from the recipe."""
    adapted = script_of(folder) == "adapt.py"
    config = asdict(read_config(adapt.Config if adapted else train.Config, folder / "config.json"))
    base = asdict(read_config(train.Config, Path(config["checkpoint"]) / "config.json")) if adapted else config
    method, dataset = base["method"], base["dataset"]
    words = [name_of_run(Path(base["from_run"]))[0], f"-> {base['steps']} steps of"] if base["from_run"] else []
    words += [method]
    words += [f"h={base['heads']}"] if method == "mhr" else []
    words += [f"r={base['rank']}"] if method != "full" and base["adapter"] == "lora" else []
    words += [f"-> {config['variant']}"] if adapted else []
    skills = ["skills"] if method in FIXED_TABLE else []
    shown = {"method", "dataset", "heads", "rank", "variant", *MAY_DIFFER, *skills}
    adapter = dict(adapter=base["adapter"]) if method == "ia3" else {}
    if not base["from_run"]:  # otherwise the label of that run says it
        words += _changed(base, asdict(train.Config(**adapter)) | recipe(PRETRAINING, dataset, method), shown)
    if adapted:
        few = recipe(FEW_SHOT, dataset, "lora" if config["variant"] == "lora" else method)
        words += _changed(config, asdict(adapt.Config()) | few, shown)
    return " ".join(words), dataset


def _changed(config: dict, recipe: dict, shown: set[str]) -> list[str]:
    return [f"{k}={v}" for k, v in config.items() if k not in shown and v not in ("", recipe[k])]


def main(flags: dict):
    print(compare(tuple(flags["runs"])))


if __name__ == "__main__":
    exit_on_user_error(main, FLAGS)
