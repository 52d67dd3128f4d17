"""experiments/real.py: one search for all methods, on dev tasks alone; it stops and goes on; its page tells what is."""

import json
import math
import re
import shutil
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import adapt
import train
from data import Example, Task
from experiments import commands, real, real_runs, verdicts, zero_shot
from experiments.real_runs import BUDGETS, METHODS, Budget, constant_key, training_flags
from plumbing.checkpoint import LOWER_RATE
from plumbing.errors import UserError
from plumbing.flags import explicit_flags, unused
from recipes import FEW_SHOT, PRETRAINING, VARIANTS
from tests.helpers import check_legible, drawn
from tools import analyze, figures

SMALL = Budget("tiny", "", 10, "", (100, 13), (0, 1, 2), 5, "--steps 2")
TASKS = ("a", "b", "c")


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs that return at once, with values drawn from their flags: (call of the command, what was run)."""
    done = []

    def run(script, flags, result, until=math.inf):
        folder = result.parent
        if result.exists():
            return json.loads(result.read_text()) | {"commit": "abc"}
        if time.monotonic() > until:
            raise commands.OutOfTime
        done.append((script, " ".join(flags)))
        folder.mkdir(parents=True, exist_ok=True)
        draw = np.random.default_rng(zlib.crc32(folder.name.encode()))
        scores = {task: float(draw.normal(50, 3)) for task in TASKS}
        done_now = {"tasks": scores, "mean": float(np.mean(list(scores.values()))), "mean_before": 1.0, "seconds": 2.0}
        done_now |= {"parameters": {"adapters": 5, "routing": 1}}
        if script == "train.py":
            (folder / "adapter.safetensors").touch()
            (folder / "log.jsonl").write_text("".join(json.dumps({"loss": 9.0 - k}) + "\n" for k in range(5)))
        elif script == "adapt.py":
            assert (real.ROOT / flags[flags.index("--checkpoint") + 1] / "adapter.safetensors").exists()
            split = folder / flags[flags.index("--split") + 1]
            split.mkdir()
            (split / "a.json").write_text(json.dumps({"stops": {"dev_loss": float(draw.random())}}))
            (split / "a").mkdir()
            (split / "a" / "adapter.safetensors").touch()
        else:
            done_now = {"over_steps": [{"step": s, "alignment": 0.1, "alignment_mixed": draw.random()} for s in (2, 4)]}
        result.write_text(json.dumps(done_now))
        return done_now | {"commit": "abc"}

    examples = [Example("", (label,)) for label in "AAB"]
    tasks = [Task(name, "EM", examples, [], examples[1:]) for name in TASKS]
    monkeypatch.setattr(real_runs, "run", run)
    monkeypatch.setattr(real_runs.Maker, "test_tasks", lambda maker, split: tasks)
    monkeypatch.setattr(figures, "save", lambda figure, stem: None)
    monkeypatch.delitem(BUDGETS, "papers")
    monkeypatch.setitem(BUDGETS, "cpu", SMALL)

    def command(*more: str):
        places = (
            f"--results {tmp_path / 'results'} --runs {tmp_path / 'runs'} --jobs 1 --device cpu --budget cpu".split()
        )
        (tmp_path / "data").mkdir(exist_ok=True)
        given = ["--data-dir", str(tmp_path / "data"), "--backbone", "B"]
        monkeypatch.setattr("sys.argv", ["real", *given, *places, *more])
        real.main()
        return (tmp_path / "results" / "real.md").read_text()

    return command, done


# --- What is made -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_its_flags_are_flags(name, budget):
    """train.py and adapt.py take them, they fit the method, and the papers' budget has the steps of 30 epochs."""
    flags = real_runs.training_flags(name, budget, "1e-3", 0, budget.steps).split()
    given = explicit_flags(train.Config, PRETRAINING, flags)
    cfg = train.make_config(**given)
    assert unused(cfg, given) == [] and cfg.dataset == "crossfit"
    for variant in METHODS[name][1]:
        for few in (budget.few, f"{budget.search_few} --test-examples 1"):
            explicit_flags(adapt.Config, FEW_SHOT, real_runs.few_shot_flags(variant, few, 100, "--lr 1e-3", 0).split())
        assert cfg.method in VARIANTS[variant]
    assert budget.steps % real_runs.LOOKS == 0  # the last look is at the end
    if budget is BUDGETS["papers"]:
        recipe = PRETRAINING["crossfit"]  # of the slice's 13,345 examples
        assert budget.steps == recipe["epochs"] * math.ceil(13_345 / recipe["batch_size"])
        assert tuple(map(str, budget.splits)) == FEW_SHOT["crossfit"]["split"]


def test_every_method_has_the_same_search(bench):
    """Three short pre-trainings, and three rates for each variant; on dev tasks, which nothing else touches."""
    command, done = bench
    command("--seeds", "0")
    short = [line for script, line in done if script == "train.py" and "--steps 5 " in line]
    assert set(Counter(re.search(r"--method .*?(?= --steps)", line)[0] for line in short).values()) == {3}
    dev = [line for script, line in done if script == "adapt.py" and "--tasks dev" in line]
    trials = {name: 3 * len(variants) + 2 for name, (_, variants) in METHODS.items()}  # two more rates of pre-training
    assert len(dev) == sum(trials.values()) and all("--test-examples 1" in line for line in dev)
    rest = [line for script, line in done if script == "adapt.py" and "--tasks all" in line]
    assert len(rest) == 2 * sum(len(variants) for _, variants in METHODS.values())  # two splits


def test_the_search_takes_the_lowest_dev_loss():
    """Whatever the scores are."""

    def trial(flags, few):
        rate, few_rate = (float(re.search(r"--lr(?:-z)? (\S+)", text)[1]) for text in (flags, few))
        return {"dev_loss": abs(rate - 3e-3) + abs(few_rate - (0.5 if "-z" in few else 3e-4)), "mean": 1 / rate}

    best = ("3e-3", {"all": "--lr 3e-4", "z": "--lr-z 5e-1", "mu": "--lr 3e-4"})
    *found, losses = real_runs.search("Poly", SMALL, trial)
    assert tuple(found) == best and losses["z"] == pytest.approx({"1e-2": 0.49, "1e-1": 0.4, "5e-1": 0.0})


def test_the_first_runs_say_most():
    """One seed of LoRA, Poly and MHR; then with scarce skills; each run once."""
    runs = real_runs.in_order((0, 1, 2))
    assert runs[:3] == [(0, "LoRA"), (0, "Poly"), (0, "MHR")] and {seed for seed, _ in runs[:5]} == {0}
    assert len(runs) == len(set(runs)) == 3 * len(METHODS)


def test_nothing_is_made_twice_and_weights_go(bench, tmp_path):
    """A second call makes nothing. A lost line is read from its run, and made again if that is lost too, with its
    pre-training, whose weights are gone."""
    command, done = bench
    page = command("--seeds", "0")
    assert not list(tmp_path.rglob("*.safetensors")) and len(done) == len(set(done))
    before = len(done)
    assert command("--seeds", "0") == page and len(done) == before
    raw = tmp_path / "results" / "real.jsonl"
    lines = raw.read_text().splitlines()
    (lost,) = (line for line in lines if "--skills 2 --heads 64" in line and "--variant z --split 13" in line)
    raw.write_text("\n".join(line for line in lines if line != lost) + "\n")
    assert command("--seeds", "0") == page and len(done) == before
    raw.write_text("\n".join(line for line in lines if line != lost) + "\n")
    maker = real_runs.Maker(raw, tmp_path / "runs", real_runs.setup_of(str(tmp_path / "data"), "B"), {}, "cpu", "", 0)
    shutil.rmtree(real.ROOT / maker.folder(*json.loads(lost)["key"].split(" | ")))
    assert command("--seeds", "0") == page
    assert [script for script, _ in done[before:]] == ["train.py", "adapt.py"]


@pytest.mark.parametrize("after", [0, 1, 7, 12, 40])
def test_it_stops_in_time_and_goes_on(bench, monkeypatch, capsys, after):
    """Stopped after any number of runs, what it has is on the page, and in the end it is what one call gives."""
    command, done = bench
    clock, limit = real_runs.run, [after]

    def slow(script, flags, result, until=math.inf):
        if not result.exists():
            limit[0] -= 1
        return clock(script, flags, result, until if limit[0] >= 0 else -math.inf)

    monkeypatch.setattr(real_runs, "run", slow)
    page = command("--seeds", "0", "--minutes", "600")
    assert "600 minutes are over: the same command goes on" in capsys.readouterr().out
    assert ("Nothing is made yet" if after < 8 else "| LoRA |") in page
    limit[0] = 10**6
    page = command("--seeds", "0", "--jobs", "3")
    assert "not made yet" not in page.split("### Comparisons")[1] and len(done) == len(set(done))


def test_a_gguf_file_is_unpacked_once(monkeypatch, tmp_path):
    """Into a folder with the same weights, another one for another file; any other backbone is used as it is."""
    from plumbing.backbones import load_backbone

    model, tokenizer = load_backbone("tiny", "cpu")
    loaded = []
    monkeypatch.setattr(real_runs, "load_backbone", lambda *args: loaded.append(args) or (model, tokenizer))
    monkeypatch.setattr(real_runs, "ROOT", tmp_path)
    for name in ("a", "b", "a"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{name}.Q4.gguf").touch()
        folder = real_runs.unpacked(str(tmp_path / name))
        assert folder == f"runs/unpacked-{name}.Q4-0"
    assert loaded == [(str(tmp_path / name), "cpu") for name in "ab"]
    again, _ = load_backbone(str(tmp_path / folder), "cpu")
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in again.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["unpacked-a.Q4-0", "unpacked-b.Q4-0"]
    assert real_runs.unpacked("tiny") == "tiny" and real_runs.unpacked(str(tmp_path / folder)) == folder


# --- The page ---------------------------------------------------------------------------------------------------------


def test_verdicts_need_three_seeds(bench):
    """With one seed there are differences and no verdict; with three the rule of verdicts.py."""
    command, _ = bench
    one = command("--seeds", "0")
    here = [line.split(" | ")[3] for line in one.split("| here |")[1].splitlines()[2:9]]
    assert len(here) == len(real.CLAIMS) and all(re.match(r"undecided: 0 of \d comparisons", cell) for cell in here)
    page = command()
    row = re.search(r"\| few-shot \| Poly > LoRA \| (.*?) \| (.*?) \| (\S+) to (\S+) \| (\w+) \| (.*?) \|", page)
    seeds = [float(x) for x in row[1].split()]
    assert len(seeds) == 3 and float(row[2]) == pytest.approx(np.mean(seeds), abs=0.1)
    test = stats.ttest_1samp(seeds, 0)
    assert row[5] == ("undecided" if test.pvalue > 0.05 else "holds" if np.mean(seeds) > 0 else "fails")
    assert [float(x) for x in row.group(3, 4)] == pytest.approx(list(test.confidence_interval()), abs=0.3)


def test_one_comparison_that_fails_decides_a_claim(bench, tmp_path):
    """Whatever the others will say; without it a claim waits for all of its comparisons."""
    claim = real.Claim("", "", (), (("a", ">", "b"), ("a", ">", "c")))
    of = lambda *values: {(seed, 1): {"mean": value} for seed, value in enumerate(values)}  # noqa: E731
    measured = {"a": of(1.0, 2.0, 3.0), "b": of(9.0, 10.5, 11.0)}
    assert real.verdict_here(measured, (1,), claim)[0] == "does not hold here"
    measured["b"] = of(0.0, 0.5, 1.0)
    assert real.verdict_here(measured, (1,), claim)[0] == "undecided: 1 of 2 comparisons have three seeds"


def test_a_floor_is_on_the_page(bench):
    """The most frequent answer of the few examples, as evaluate.py --constant scores it: A, right in one of two."""
    command, _ = bench
    page = command("--seeds", "0")
    assert "| constant answers | 2 | 0 | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 |" in page
    assert "| best constant answers | 2 | 0 | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 |" in page


def test_the_best_constant_answer_is_chosen_by_the_test_examples(monkeypatch, tmp_path):
    """Of the few examples' answers: A is the more frequent, B is right in three of four."""
    few = [Example("", (answer,)) for answer in "AAB"]
    task = Task("t", "EM", few, [], [Example("", (answer,)) for answer in "BBBA"])
    monkeypatch.setattr(real_runs.Maker, "test_tasks", lambda self, split: [task])
    maker = real_runs.Maker(tmp_path / "real.jsonl", tmp_path, "s", {}, "cpu", "cpu", math.inf)
    means = {of: maker.constant(100, "", of)["mean"] for of in real.CONSTANT}
    assert means == {"most frequent": 25.0, "best": 75.0}
    assert {of: maker.constant(100, "--test-examples 1", of)["mean"] for of in means} == {
        "most frequent": 0,
        "best": 100,
    }


def test_with_one_seed_the_deviation_is_that_of_strings():
    """Of the same comparison, where LoRA is called LoRA (Shared); without one there is no number of seeds."""
    toy, claim = verdicts.read_raw(verdicts.ROOT / "results" / "claims.jsonl"), real.CLAIMS["μ"]
    theirs = verdicts.CLAIMS["mu"].compare.index(("Poly-mu", ">", "LoRA (Shared)"))
    part = verdicts.judged(verdicts.CLAIMS["mu"], toy, verdicts.SEEDS)[theirs]
    assert real.spread_on_strings(("Poly-mu", ">", "LoRA"), claim, toy) == pytest.approx(np.std(part.seeds, ddof=1))
    assert real.spread_on_strings(("Poly-mu", ">", "LoRA"), claim, {}) == 0
    assert real.spread_on_strings(("Poly-mu", ">", "LoRA-big"), claim, toy) == 0  # not asked there
    for name, twin, same in (
        ("few-shot", "few-shot", (("Poly", ">", "LoRA-big"),) * 2),
        ("random", "random", (("Random-mu", "<=", "LoRA"), ("Random by task-mu", "<=", "LoRA (Shared)"))),
        ("random", "random-scarce", (("Random-mu, s = 2", "<=", "LoRA"),
                                     ("Random by task-mu, s = 2", "<=", "LoRA, s = 1"))),
        ("scarce", "scarce", (("MHR, s = 2 - Poly, s = 2", ">", "MHR - Poly"),
                              ("MHR, s = 2 - Poly, s = 2", ">", "MHR, s = 8 - Poly, s = 8"))),
        ("scarce", "z-scarce", (("MHR-z, s = 2", ">", "Poly-z, s = 2"),) * 2),
        ("alignment", "alignment", tuple(("alignment of MHR, mixtures", ">", f"alignment of {lora}, mixtures")
                                         for lora in ("LoRA", "LoRA (Shared)"))),
    ):  # fmt: skip
        part = verdicts.judged(verdicts.CLAIMS[twin], toy, verdicts.SEEDS)[verdicts.CLAIMS[twin].compare.index(same[1])]
        assert same[0] in real.CLAIMS[name].compare
        assert real.spread_on_strings(same[0], real.CLAIMS[name], toy) == pytest.approx(np.std(part.seeds, ddof=1))
    assert real.would_decide(">", [1.0], 0.0) == ""
    assert real.would_decide("~", [0.5], 3.0) == f"{real.enough('~', 0.5, 3.0)} seeds"


def test_seeds_and_splits_are_paired():
    """A difference is taken where both sides have the seed and the split, also of differences of measures. A seed
    counts when it has all splits."""
    of = lambda pairs: {key: {"mean": value} for key, value in pairs.items()}  # noqa: E731
    measured = {"a": of({(0, 1): 5, (0, 2): 9, (1, 1): 3}), "b": of({(0, 1): 1, (1, 1): 4}), "c": of({(0, 1): 2})}
    assert real.differences(measured, "a", "b") == {(0, 1): 4, (1, 1): -1}
    assert real.differences(measured, "a - b", "c") == {(0, 1): 2} and real.differences(measured, "a", "d") == {}
    assert real.by_seed({(0, 1): 4, (0, 2): 2, (1, 1): -1}, (1, 2)) == ([3], [-1])
    assert real.by_seed({(0,): 4, (1,): 2}, (1, 2)) == ([4, 2], [])  # alignments have no splits


def test_a_part_of_a_seed_decides_nothing(bench, tmp_path):
    """Three seeds of which one lacks a split of one side: in brackets, and no verdict."""
    command, _ = bench
    command()
    raw = tmp_path / "results" / "real.jsonl"
    lost = lambda key: "--method lora --steps 10" in key and "--split 13" in key and "--seed 2 |" in key  # noqa: E731
    lines = raw.read_text().splitlines()
    raw.write_text("".join(f"{line}\n" for line in lines if not lost(json.loads(line)["key"])))
    real.write(tmp_path / "results")
    page = (tmp_path / "results" / "real.md").read_text()
    assert len(lines) - len(raw.read_text().splitlines()) == 1
    assert re.search(r"\| Poly > LoRA \| \S+ \S+ \([+-][\d.]+\) \| [+-][\d.]+ \|  \| undecided \|", page)
    assert "| undecided: 2 of 3 comparisons have three seeds |" in page
    kept = [json.loads(line) for line in raw.read_text().splitlines()]
    raw.write_text("".join(f"{json.dumps(line)}\n" for line in kept if "--seed 2 |" not in line["key"]))
    real.write(tmp_path / "results")  # without the rest of that seed the numbers of LoRA are the same
    scores = lambda page: re.search(r"\n\| LoRA \|(.*)", page.split("| before |")[1])[1]  # noqa: E731
    without = (tmp_path / "results" / "real.md").read_text()
    assert scores(page) == scores(without)
    row = lambda page: re.search(r"\| Poly > LoRA \| .*", page)[0].split(" | ")[2:]  # noqa: E731
    assert row(page) == row(without)


def test_a_rate_at_which_training_fails_is_the_worst(bench, monkeypatch, tmp_path):
    """It is written down as such and not tried again; another failure ends the command with its words."""
    command, done = bench
    inner, broken = real_runs.run, [LOWER_RATE]

    def run(script, flags, result, until=math.inf):
        if script == "train.py" and "--lr 3e-3" in " ".join(flags):
            done.append(("failed", " ".join(flags)))
            raise commands.Failed(f"train.py ended with code 1: the loss is nan. {broken[0]}")
        return inner(script, flags, result, until)

    monkeypatch.setattr(real_runs, "run", run)
    page = command("--seeds", "0")
    rows = [line.strip("| ").split(" | ") for line in page.split("### Learning rates")[1].splitlines()]
    rates = [row[2:] for row in rows if row[1:2] == ["pre-training"]]
    assert len(rates) == len(METHODS) and all(each[2] == "3e-3: failed" and "3e-3" not in each[3] for each in rates)
    failed = [line for line in done if line[0] == "failed"]
    assert len(failed) == len(set(failed)) == len(METHODS)
    command("--seeds", "0")
    assert len([line for line in done if line[0] == "failed"]) == len(failed)
    (tmp_path / "results" / "real.jsonl").unlink()
    broken[0] = "out of memory"
    with pytest.raises(commands.Failed, match="out of memory"):
        command("--seeds", "0")


def test_a_run_that_is_not_finite_stops_no_other(bench, monkeypatch):
    """It is written down, said on the page, and not tried again; the other runs are made."""
    command, done = bench
    inner = real_runs.run

    def run(script, flags, result, until=math.inf):
        if script == "train.py" and "--method poly --skills 8" in " ".join(flags) and "--steps 10 " in " ".join(flags):
            done.append(("failed", " ".join(flags)))
            raise commands.Failed(f"train.py ended with code 1: the loss is nan. {LOWER_RATE}")
        return inner(script, flags, result, until)

    monkeypatch.setattr(real_runs, "run", run)
    page = command("--seeds", "0")
    assert "Training was not finite, and what followed was left out: Poly of seed 0." in page
    scores = page.split("### Comparisons")[0]
    assert "| MHR-μ | 2 |" in scores and "| Poly |" not in scores and "| few-shot | MHR > Poly | not made yet |" in page
    before = len(done)
    assert command("--seeds", "0") == page and len(done) == before


def test_a_search_that_fails_everywhere_is_one_sentence():
    """No rate is taken then; of some the lowest finite loss is."""
    assert real_runs.lowest({"1e-3": None, "3e-3": 2.0, "1e-2": 1.0}, "Poly") == "1e-2"
    with pytest.raises(UserError, match="Poly, --lr: training fails at all of 1e-3, 3e-3"):
        real_runs.lowest({"1e-3": None, "3e-3": None}, "Poly, --lr")


def test_values_of_another_setup_are_refused(bench, tmp_path, monkeypatch):
    """Another backbone, other data or another recipe: nothing is made, nothing is taken for this one's."""
    command, done = bench
    page, before = command("--seeds", "0"), len(done)
    (tmp_path / "other").mkdir()
    for more in (["--backbone", "C"], ["--data-dir", str(tmp_path / "other")]):
        with pytest.raises(UserError, match="has values of .*, these would be of .*: give another --results"):
            command("--seeds", "0", *more)
    with monkeypatch.context() as patch:
        patch.setitem(FEW_SHOT["crossfit"], "lr_z", 0.123)
        with pytest.raises(UserError, match="recipe"):
            command("--seeds", "0")
    (tmp_path / "data" / "more.tsv").write_text("a\tb\n")
    with pytest.raises(UserError, match="has values of data \\(0 bytes\\), .*, these would be of data \\(4 bytes\\)"):
        command("--seeds", "0")
    (tmp_path / "data" / "more.tsv").unlink()
    assert command("--seeds", "0") == page and len(done) == before


def test_it_goes_on_where_it_was_moved_to(bench, tmp_path, monkeypatch):
    """Paths of runs and backbones are relative to the repository: another place of it changes none."""
    maker = real_runs.Maker(tmp_path / "r.jsonl", real.ROOT / "runs" / "real", "s", {"--data-dir": "d"}, "cpu", "", 0)
    assert str(maker.folder("a", "b")).startswith("runs/real/") and real_runs.unpacked("some/name") == "some/name"
    here = maker.folder("a")
    monkeypatch.setattr(real_runs, "ROOT", tmp_path)
    maker.runs = tmp_path / "runs" / "real"
    assert maker.folder("a") == here


@pytest.mark.parametrize("relation", [">", "~", "<="])
@pytest.mark.parametrize("mean, std", [(6.5, 4.0), (-7.0, 4.0), (1.0, 4.0), (3.0, 0.5), (-2.0, 3.0)])
def test_enough_seeds_are_the_fewest(relation, mean, std):
    """With so many seeds of this mean and deviation the rule decides, with one fewer it does not."""
    n = real.enough(relation, mean, std)

    def says(count: int) -> str:
        x = np.arange(count) - (count - 1) / 2
        return verdicts.judge(mean + x * std / x.std(ddof=1), relation, np.zeros(count)).says

    assert says(n) != "undecided" and (n == 3 or says(n - 1) == "undecided")
    assert real.enough(">", 0.0, 1.0) is None and real.enough("~", 5.0, 1.0) is None


def test_its_figure_is_legible(bench, monkeypatch):
    """With all methods, of three seeds."""
    command, _ = bench
    figure = drawn(monkeypatch, lambda: command())
    check_legible(figure)
    assert any("3 seeds" in text.get_text() for text in figure.texts)


@pytest.mark.parametrize("stem, module", [("real", real), ("zero-shot", zero_shot)])
def test_the_page_of_the_results_is_what_its_raw_file_gives(monkeypatch, stem, module):
    """results/real.md and zero-shot.md, if they are there, are made from the raw file beside them."""
    results = real.ROOT / "results"
    if not (results / f"{stem}.md").exists():
        pytest.skip(f"results/{stem}.md is not made yet")
    made = {}
    monkeypatch.setattr(Path, "write_text", lambda path, text: made.update({path.name: text}))
    monkeypatch.setattr(figures, "save", lambda *_: None)
    module.write(results)
    assert made == {f"{stem}.md": (results / f"{stem}.md").read_text()}


# --- Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, named",
    [("", "--data-dir"), ("--data-dir D", "--data-dir and --backbone"), ("--page --jobs 0", "--jobs"),
     ("--page --minutes 0", "--jobs and --minutes"), ("--page --minutes nan", "--jobs and --minutes"),
     ("--page --seeds -1", "--jobs"),
     ("--page --results FILE", "--results FILE"), ("--page --seeds 0 0", "--seeds"),
     ("--data-dir NONE --backbone B", "--data-dir NONE")],
)  # fmt: skip
def test_flags_that_cannot_be(monkeypatch, capsys, tmp_path, line, named):
    """One sentence that names the flag, exit code 2."""
    (tmp_path / "FILE").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["real", *line.split()])
    with pytest.raises(SystemExit) as stopped:
        real.main()
    assert stopped.value.code == 2 and f"error: {named}" in capsys.readouterr().err


FLAGS = training_flags("LoRA", BUDGETS["cpu"], "1e-3", 0, 500)
TRAINED = {"loss": [2.0, 1.0], "parameters": {"adapters": 3}, "seconds": 1.5}
LINE = {"key": FLAGS, "value": TRAINED, "commit": "abc", "made": "2026-01-02", "on": "cpu", "setup": "s"}
SCORED = {"tasks": {"t": 1.0}, "mean": 1.0, "before": 1.0, "parameters": {}}


@pytest.mark.parametrize(
    "odd",
    ["{", "[]", "\0", '{"key": "a", "value": 1}', '{"key": 1}', *(json.dumps(LINE | change) for change in (
        *({"key": f"{FLAGS} | {what}"} for what in ("b --tasks all", "b --tasks dev", "alignment", "failed")),
        *({"key": f"{FLAGS} | b --tasks all", "value": SCORED | odd}
          for odd in ({"tasks": {"t": "1"}}, {"mean": "1"}, {"parameters": {"z": "1"}}, {"parameters": 1})),
        {"key": f"{FLAGS} | b --tasks dev", "value": {"dev_loss": "1"}},
        *({"key": constant_key(13, "--steps 1", of), "value": {}} for of in real.CONSTANT),
        *({"key": key, "value": SCORED} for key in (f"{FLAGS}x", "a", "a | b --tasks all", f"{FLAGS} | b")),
        *({"value": TRAINED | odd} for odd in ({"loss": 1}, {"loss": [1]}, {"loss": "ab"}, {"seconds": None})),
        *({"key": zero_shot.training_flags("LoRA", "1e-3", 0, steps), "value": {}}
          for steps in (zero_shot.SEARCH_STEPS, 1000)),
        *({"key": zero_shot.key_of(FLAGS, further), "value": {}} for further in ("", "b")),
    ))],
)  # fmt: skip
def test_a_damaged_raw_file_is_one_sentence(tmp_path, odd):
    (tmp_path / "real.jsonl").write_text(json.dumps(LINE) + "\n")
    assert real_runs.read_raw(tmp_path / "real.jsonl") == {FLAGS: LINE}
    with open(tmp_path / "real.jsonl", "a") as file:
        file.write(f"{odd}\n")
    with pytest.raises(UserError, match="real.jsonl:2 is damaged"):
        real_runs.read_raw(tmp_path / "real.jsonl")


def test_the_papers_budget_is_for_a_gpu(monkeypatch, tmp_path):
    """On a CPU it would take weeks; and the table of a budget is of one kind of machine."""
    places = f"--results {tmp_path / 'a'} --runs {tmp_path / 'b'}".split()
    for device, budget in (("cpu", "papers"), ("cuda", "cpu")):
        flags = ["--data-dir", str(tmp_path), "--backbone", "B", "--device", device, "--budget", budget, *places]
        monkeypatch.setattr("sys.argv", ["real", *flags])
        with pytest.raises(UserError, match="--budget papers is for a GPU, --budget cpu for a CPU"):
            real.main()


# --- For true ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_of_it_with_a_tiny_model(monkeypatch, tmp_path):
    """The real scripts, in this process, on the bundled sample of CrossFit: a value for all, weights deleted."""

    def run(script, flags, result, until=math.inf):
        if not result.exists():
            module, recipes = {"train.py": (train, PRETRAINING), "adapt.py": (adapt, FEW_SHOT)}.get(
                script, (analyze, {})
            )
            module.main(explicit_flags(module.Config, recipes, flags))
        return json.loads(result.read_text()) | {"commit": "abc"}

    monkeypatch.setattr(real_runs, "run", run)
    small, few = "--max-input 32 --max-output 8 --batch-size 4", "--eval-every 1 --beams 1"
    tiny = Budget("tiny", small, 5, f"--steps 2 {few}", (100,), (0,), 5, f"--steps 1 {few}")
    monkeypatch.setitem(BUDGETS, "cpu", tiny)
    for name in set(METHODS) - {"LoRA", "MHR"}:
        monkeypatch.delitem(METHODS, name)
    monkeypatch.setitem(METHODS, "MHR", ("--method mhr --skills 2 --heads 2", ("all", "z")))
    for group in ("CORE", "SCARCE"):
        monkeypatch.setattr(real_runs, group, ("LoRA", "MHR") if group == "CORE" else ())
    sample = real.ROOT / "assets" / "samples" / "crossfit"
    places = f"--results {tmp_path / 'results'} --runs {tmp_path / 'runs'} --jobs 1 --device cpu --budget cpu".split()
    monkeypatch.setattr("sys.argv", ["real", "--data-dir", str(sample), "--backbone", "tiny", *places])
    real.main()
    page = (tmp_path / "results" / "real.md").read_text()
    assert re.search(r"^\| MHR-z \| 1 \|", page, re.M) and re.search(r"^\| LoRA \| 1 \| [\d,]+ \| 0 \|", page, re.M)
    assert not list((tmp_path / "runs").rglob("*.safetensors")) and (tmp_path / "results" / "real-cpu.png").exists()
