"""experiments/zero_shot.py: the same search for all methods, on training tasks alone; it goes on; its page."""

import json
import math
import os
import re
import shutil
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import train
from experiments import commands, real, real_runs, zero_shot
from experiments.real import Claim
from experiments.zero_shot import BACKBONE, FURTHER, METHODS, RATES
from inject import task_ids
from methods import load_run
from plumbing.backbones import load_backbone
from plumbing.checkpoint import LOWER_RATE
from plumbing.errors import UserError
from plumbing.flags import explicit_flags, unused
from plumbing.folders import write_config
from recipes import PRETRAINING
from tests.helpers import check_legible, drawn
from tools import figures

TASKS = ("a", "b")


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs that return at once, with values drawn from their flags: (call of the command, what was run)."""
    done = []

    def run(script, flags, result, until=math.inf):
        folder = result.parent
        if result.exists():
            return json.loads(result.read_text()) | {"commit": "abc"}
        if until < 0:
            raise commands.OutOfTime
        done.append((script, " ".join(flags)))
        draw = np.random.default_rng(zlib.crc32(folder.name.encode()))
        weights = lambda flag: real.ROOT / flags[flags.index(flag) + 1] / "adapter.safetensors"  # noqa: E731
        if script == "train.py":
            assert "--from-run" not in flags or weights("--from-run").exists()
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "adapter.safetensors").touch()
            (folder / "log.jsonl").write_text(json.dumps({"loss": 9.0, "valid_loss": float(draw.random())}) + "\n")
            made = {"steps": 5, "seconds": 2.0, "parameters": {"adapters": 5, "routing": 1}}
        else:
            assert script == "evaluate.py" and weights("--checkpoint").exists()
            assert flags[flags.index("--save") + 1] == os.path.relpath(result, real.ROOT)
            scores = {task: {"Rouge-L": float(draw.normal(50, 3)), "SuperNI-EM": 1.0} for task in TASKS}
            made = {"tasks": scores, "mean": float(np.mean([of["Rouge-L"] for of in scores.values()]))}
        result.write_text(json.dumps(made))
        (folder / "commit").write_text("abc")
        return made | {"commit": "abc"}

    monkeypatch.setattr(real_runs, "run", run)
    monkeypatch.setattr(figures, "save", lambda figure, stem: None)

    def command(*more: str, place: Path = tmp_path):
        places = f"--results {place / 'results'} --runs {place / 'runs'} --jobs 1 --device cpu".split()
        (tmp_path / "data").mkdir(exist_ok=True)
        given = ["--data-dir", str(tmp_path / "data"), "--backbone", "B"]
        monkeypatch.setattr("sys.argv", ["zero_shot", *given, *places, *more])
        zero_shot.main()
        return (place / "results" / "zero-shot.md").read_text()

    return command, done


# --- What is made -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_its_flags_are_flags(name):
    """Those of train.py fit the method, and those of evaluate.py are its own."""
    for steps in (zero_shot.STEPS, zero_shot.SEARCH_STEPS):
        given = explicit_flags(train.Config, PRETRAINING, zero_shot.training_flags(name, "1e-3", 0, steps).split())
        cfg = train.make_config(**given)
        assert unused(cfg, given) == [] and cfg.dataset == "superni" and cfg.batch_size == 8
        assert bool(cfg.eval_every) == (steps == zero_shot.SEARCH_STEPS)
    explicit_flags(evaluate.Config, {}, ["--checkpoint", "a", *zero_shot.SCORE.split()])


@pytest.mark.parametrize("name", METHODS)
def test_further_steps_change_nothing_else(name, tmp_path):
    """Their settings are those of the run that they begin with, on a CPU too."""
    given = explicit_flags(train.Config, PRETRAINING, zero_shot.training_flags(name, "1e-3", 0, 950).split())
    base = train.make_config(**given, device="cpu")
    write_config(tmp_path, base)
    flags = explicit_flags(train.Config, PRETRAINING, zero_shot.further_flags(name, 50).split())
    cfg = train.make_config(**flags, from_run=str(tmp_path), device="cpu")
    changed = {field: getattr(cfg, field) for field, value in vars(base).items() if getattr(cfg, field) != value}
    assert changed.pop("from_run") == str(tmp_path) and changed.pop("output_dir")
    assert changed.pop("steps") == 50 and changed in ({}, {"method": "mu"}) and cfg.precision == "bf16"


def test_it_has_as_many_passes_as_the_authors():
    """Of 8 examples a step: theirs 25,000 steps over 756 tasks of at most 100 examples, here 30 of 95."""
    recipe = PRETRAINING["superni"]
    theirs, here = recipe["steps"] * recipe["batch_size"] / (756 * 100), zero_shot.STEPS * 8 / (30 * 95)
    assert here == pytest.approx(theirs, rel=0.01)


def test_every_method_has_the_same_search_and_the_same_steps(bench):
    """Three short pre-trainings of seed 0; then each one's rate for the seed, and the further steps from it."""
    command, done = bench
    command("--seeds", "0", "1")
    trained = [line for script, line in done if script == "train.py"]
    short = [line for line in trained if f"--steps {zero_shot.SEARCH_STEPS} " in line]
    of = lambda line: re.search(r"--method .*?(?= --steps)", line)[0]  # noqa: E731
    assert set(Counter(map(of, short)).values()) == {len(RATES)} and len(short) == len(RATES) * len(METHODS)
    whole = [line for line in trained if f"--steps {zero_shot.STEPS} " in line]
    assert set(Counter(map(of, whole)).values()) == {2}
    on = Counter(re.search(r"--method (\w+) --steps (\d+)", line).groups() for line in trained if "--from-run" in line)
    assert on == {(how, str(k)): 2 * n for how, n in (("lora", 1), ("mu", 2)) for k in FURTHER[1:]}
    scored = [line for script, line in done if script == "evaluate.py"]
    assert len(scored) == len(set(scored)) == 1 + 2 * len(METHODS) * len(FURTHER)


def test_the_search_takes_the_lowest_loss():
    losses = {"3e-4": 2.0, "1e-3": None, "3e-3": 1.5}  # None: training failed
    look = lambda flags: {"valid_loss": losses[re.search(r"--lr (\S+)", flags)[1]]}  # noqa: E731
    assert zero_shot.search("LoRA", look) == ("3e-3", {"3e-4": 2.0, "1e-3": None, "3e-3": 1.5})
    losses |= dict.fromkeys(losses)
    with pytest.raises(UserError, match="LoRA, --lr: training fails at all of"):
        zero_shot.search("LoRA", look)


def test_nothing_is_made_twice_and_weights_go(bench, tmp_path):
    """A lost line is read from its run, and made again if that is lost too, with the trainings whose weights are
    gone."""
    command, done = bench
    page = command("--seeds", "0")
    assert not list((tmp_path / "runs").rglob("*.safetensors")) and len(done) == len(set(done))
    before = len(done)
    raw = tmp_path / "results" / "zero-shot.jsonl"
    lines = raw.read_text().splitlines()
    (lost,) = (line for line in lines if "poly" in line and "mu --steps 100 " in line)
    raw.write_text("\n".join(line for line in lines if line != lost) + "\n")
    assert command("--seeds", "0") == page and len(done) == before
    raw.write_text("\n".join(line for line in lines if line != lost) + "\n")
    maker = real_runs.Maker(raw, tmp_path / "runs", json.loads(lost)["setup"], {}, "cpu", "", 0)
    flags, further, score = json.loads(lost)["key"].split(" | ")
    shutil.rmtree(real.ROOT / maker.folder(flags, f"{further} {score}"))
    assert command("--seeds", "0") == page
    assert [script for script, _ in done[before:]] == ["train.py", "train.py", "evaluate.py"]


@pytest.mark.parametrize("after", [0, 1, 5, 9, 14, 20, 33])
def test_it_stops_in_time_and_goes_on(bench, monkeypatch, capsys, tmp_path, after):
    """Stopped after any number of runs, what it has is on the page, and in the end it is what one call gives."""
    command, done = bench
    once = command("--seeds", "0", place=tmp_path / "once")
    assert len(done) > 33
    done.clear()
    inner, limit = real_runs.run, [after]

    def slow(script, flags, result, until=math.inf):
        limit[0] -= not result.exists()
        return inner(script, flags, result, 0 if limit[0] >= 0 else -1)

    monkeypatch.setattr(real_runs, "run", slow)
    page = command("--seeds", "0", "--minutes", "600")
    assert "600 minutes are over: the same command goes on" in capsys.readouterr().out
    assert ("Nothing is made yet" if after < 2 else f"| {BACKBONE} |") in page
    limit[0] = 10**6
    assert command("--seeds", "0") == once and len(done) == len(set(done))
    assert "not made yet" not in once.split("### Comparisons")[1] and not list(tmp_path.rglob("*.safetensors"))


def test_a_rate_at_which_training_fails_is_the_worst(bench, monkeypatch, tmp_path):
    """It is tried once, and its checkpoint goes; another failure ends the command with its words."""
    command, done = bench
    inner, says = real_runs.run, [LOWER_RATE]

    def run(script, flags, result, until=math.inf):
        if script == "train.py" and "--lr 3e-3" in " ".join(flags):
            done.append((script, " ".join(flags)))
            result.parent.mkdir(parents=True)
            (result.parent / "checkpoint.safetensors").touch()
            raise commands.Failed(f"train.py ended with code 1: the loss is nan. {says[0]}")
        return inner(script, flags, result, until)

    monkeypatch.setattr(real_runs, "run", run)
    page = command("--seeds", "0")
    rows = [line.split(" | ") for line in page.split("### Learning rates")[1].splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(METHODS) and all(row[3] == "failed" and "3e-3" not in row[4] for row in rows[1:])
    assert command("--seeds", "0") == page and sum("3e-3" in flags for _, flags in done) == len(METHODS)
    assert not list(tmp_path.rglob("*.safetensors"))
    says[0] = "out of memory"
    with pytest.raises(commands.Failed, match="out of memory"):
        command("--seeds", "0", place=tmp_path / "other")


def test_a_run_that_is_not_finite_stops_no_other(bench, monkeypatch, tmp_path):
    """It is written down and said on the page, and not begun again; another failure stops all."""
    command, done = bench
    usual, says = real_runs.run, [LOWER_RATE]

    def fails(script, flags, result, until=math.inf):
        text = " ".join(flags)
        if script == "train.py" and "--method poly" in text and f"--steps {zero_shot.STEPS} " in text:
            raise commands.Failed(says[0])
        return usual(script, flags, result, until)

    monkeypatch.setattr(real_runs, "run", fails)
    page = command("--seeds", "0")
    assert "was not finite, and what followed was left out: Poly-mu of seed 0.\n" in page and "| MHR-μ | 1 |" in page
    made = len(done)
    command("--seeds", "0")
    assert len(done) == made
    says[0] = "out of memory"
    with pytest.raises(commands.Failed, match="out of memory"):
        command("--seeds", "1")


# --- The page ---------------------------------------------------------------------------------------------------------


def test_verdicts_need_three_seeds(bench):
    command, _ = bench
    one = command("--seeds", "0")
    assert len(re.findall(r"undecided: 0 of \d comparisons have three seeds", one)) == len(zero_shot.CLAIMS)
    assert "undecided: 0 of" not in command()


def test_its_figure_is_legible(bench, monkeypatch):
    command, _ = bench
    check_legible(drawn(monkeypatch, lambda: command()))


def test_values_of_another_setup_are_refused(bench, monkeypatch):
    command, done = bench
    command("--seeds", "0")
    before = len(done)
    monkeypatch.setattr(zero_shot, "SETTING", zero_shot.SETTING + " --skills 3")
    with pytest.raises(UserError, match="zero-shot.jsonl has values of .*, these would be of"):
        command("--seeds", "0")
    assert len(done) == before


@pytest.mark.parametrize(
    "line, named",
    [("", "--data-dir"), ("--page --jobs 0", "--jobs"), ("--budget cpu", "unrecognized arguments: --budget")],
)
def test_flags_that_cannot_be(monkeypatch, capsys, line, named):
    monkeypatch.setattr("sys.argv", ["zero_shot", *line.split()])
    with pytest.raises(SystemExit) as stopped:
        zero_shot.main()
    assert stopped.value.code == 2 and f"error: {named}" in capsys.readouterr().err


# --- For true ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_of_it_with_a_tiny_model(monkeypatch, tmp_path):
    """The real scripts, in this process, on the bundled sample of SuperNI: a value for all, weights deleted; what is
    scored as the backbone alone answers as the backbone does."""

    same = []

    def run(script, flags, result, until=math.inf):
        if not result.exists():
            module, recipes = {"train.py": (train, PRETRAINING), "evaluate.py": (evaluate, {})}[script]
            module.main(explicit_flags(module.Config, recipes, flags))
            if "1e-30" in flags:
                run_of_backbone, _ = load_run(result.parent, train.run_config(str(result.parent)))
                backbone, _ = load_backbone("tiny", "cpu")
                ids = torch.arange(2, 8)[None]
                with torch.no_grad(), task_ids([0]):
                    outputs = [m(input_ids=ids, decoder_input_ids=ids).logits for m in (run_of_backbone, backbone)]
                same.append(torch.equal(*outputs))
        return json.loads(result.read_text()) | {"commit": "abc"}

    monkeypatch.setattr(real_runs, "run", run)
    small = "--dataset superni --layers self-attention --rank 4 --max-input 32 --max-output 8 --batch-size 4"
    monkeypatch.setattr(zero_shot, "SETTING", small)
    monkeypatch.setattr(zero_shot, "UNTOUCHED", f"{small} --method lora --steps 1 --lr 1e-30 --seed 0")
    monkeypatch.setattr(zero_shot, "STEPS", 3)
    monkeypatch.setattr(zero_shot, "SEARCH_STEPS", 2)
    monkeypatch.setattr(zero_shot, "FURTHER", (0, 1))
    few = Claim("", "", (), (("LoRA", ">", "MHR-mu"), ("MHR-mu, +1 steps", ">", "LoRA, +1 steps")))
    monkeypatch.setattr(zero_shot, "CLAIMS", {"zero-shot": few})
    sample = real.ROOT / "assets" / "samples" / "superni"
    places = f"--results {tmp_path / 'results'} --runs {tmp_path / 'runs'} --jobs 1 --device cpu --seeds 0".split()
    monkeypatch.setattr("sys.argv", ["zero_shot", "--data-dir", str(sample), "--backbone", "tiny", *places])
    zero_shot.main()
    page = (tmp_path / "results" / "zero-shot.md").read_text()
    assert same == [True]
    for name in (BACKBONE, "LoRA", "LoRA, +1 steps", "Poly-μ", "Poly-μ, +1 steps", "MHR-μ", "MHR-μ, +1 steps"):
        assert re.search(rf"^\| {re.escape(name)} \| 1 \|", page, re.M)
    assert not list((tmp_path / "runs").rglob("*.safetensors")) and (tmp_path / "results" / "zero-shot.png").exists()
