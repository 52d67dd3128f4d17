"""experiments/methods.py: the search has the same steps for all methods, and existing runs are reused."""

import math
import re
import runpy
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import adapt
import train
from data import WINDOW
from experiments import methods, mixing
from plumbing.errors import UserError
from plumbing.flags import explicit_flags
from plumbing.folders import read_json, write_config, write_json
from recipes import FEW_SHOT, PRETRAINING, VARIANTS, recipe


@given(st.floats(-3, 3), st.sampled_from([1e-3, 5e-3, 0.5]))
def test_the_search_climbs_to_the_best_rate(peak, middle):
    """With one peak within 27 times of the middle, the rate nearest to it is found, and rates on both sides tried."""
    tried = []

    def score(rate):
        tried.append(rate)
        return -abs(round(math.log(rate / middle, 3), 6) - peak)

    best = methods.search(score, middle)
    assert abs(math.log(best / middle, 3) - peak) <= 0.5 + 1e-5
    assert min(tried) < best < max(tried) and len(tried) == len(set(tried)) <= 7


def test_the_search_stops():
    """A score that rises for ever is followed for seven rates."""
    tried = []
    assert methods.search(lambda rate: tried.append(rate) or rate, 1.0) == max(tried) == 3.0**5 and len(tried) == 7


def test_equal_scores_keep_the_middle():
    """Of equal scores the first one wins."""
    assert methods.search(lambda rate: 1.0, 5e-3) == 5e-3


@pytest.fixture
def trials(monkeypatch, tmp_path):
    """methods.py with runs that return at once; the list of what was trained and adapted."""
    made = []
    monkeypatch.setattr(methods, "TRIALS", tmp_path / "trials.jsonl")
    monkeypatch.setattr(methods, "pretrain", lambda name, seed, root, flags: (made.append(flags) or flags, {}))

    def adapt(checkpoint, variant, seed, flags):
        made.append((checkpoint, variant, flags))
        off = abs(float(flags[1].split("=")[1]) - 0.003) + abs(float(checkpoint[0].split("=")[1]) - 0.005)
        return {"mean": -off, "commit": "c"}

    monkeypatch.setattr(methods, "adapt", adapt)
    return made


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_variant_gets_a_rate_of_its_own(trials, tmp_path, name):
    """One line is marked for each variant, all with the same pre-training: those are the lines of RATES."""
    lines = methods.tune(name, tmp_path)
    best = [line for line in lines if line[-1]]
    assert sorted(line[2] for line in best) == sorted(methods.METHODS[name][1])
    assert len({line[1] for line in best}) == 1
    assert all(line[3].startswith("--lr-z=" if line[2] == "z" else "--lr=") for line in best)


def test_what_was_tried_is_not_made_again(trials, tmp_path):
    """A second search reads all scores from the file, without a run; a damaged line is named."""
    first, made = methods.tune("MHR", tmp_path), len(trials)
    assert made and methods.tune("MHR", tmp_path) == first and len(trials) == made
    lines = methods.TRIALS.read_text().splitlines()
    assert len(lines) == len(first)
    methods.TRIALS.write_text("\n".join([lines[0], lines[1].replace('"dev"', '"dve"')]) + "\n")
    with pytest.raises(UserError, match=r"trials\.jsonl:2 is damaged"):
        methods.tune("MHR", tmp_path)


OWN_RATES = ("LoRA-big", "Random by task")  # another size or form of a method: the recipe is that of the first


@pytest.mark.parametrize("name", [name for name in methods.METHODS if name not in OWN_RATES])
def test_the_recipes_have_the_rates_of_the_table(name):
    """`train.py --dataset strings --method M` without --lr is the table's run, and so is the adaptation by the first
    variant (Poly, whose variants differ: by mu)."""
    method = methods.METHODS[name][0].split()[1]
    pretraining = dict(pair.lstrip("-").split("=") for pair in methods.RATES[name][0].split())
    assert recipe(PRETRAINING, "strings", method)["lr"] == float(pretraining["lr"])
    few = methods.RATES[name][1]["mu" if name == "Poly" else methods.METHODS[name][1][0]]
    assert recipe(FEW_SHOT, "strings", method)["lr"] == float(few.removeprefix("--lr="))


def test_flags_give_all_that_a_methods_own_recipe_sets():
    """A method's own recipe sets --lr alone, which runs give as a flag: so the name of RUNS has the whole recipe."""
    for recipes in (PRETRAINING, FEW_SHOT):
        own = [values for key, values in recipes.items() if key[0] == "strings"]
        assert own and all(set(values) == {"lr"} for values in own)


def test_every_method_has_rates_for_its_variants():
    for name, (_, variants) in methods.METHODS.items():
        assert set(methods.RATES[name][1]) == set(variants) <= set(VARIANTS)


def test_another_recipe_is_another_folder():
    """Runs are found by their flags; settings without a flag are in the folder's name."""
    again = lambda: runpy.run_path(methods.__file__)["RUNS"].name  # noqa: E731
    assert again() == methods.RUNS.name
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRETRAINING["strings"], "steps", 7)
        assert again() != methods.RUNS.name


@pytest.mark.parametrize(
    "line, named",
    [("--jobs 0", "--jobs"), ("--jobs -1", "--jobs"), ("--seeds -1", "--seeds"), ("--seeds 0 1 0", "--seeds"),
     ("--methods MHR MHR", "--methods"), ("--skills 2", "--skills"), ("--tune --skills 0", "--skills"),
     ("--tune --skills 2 --methods Full", "--skills")],
)  # fmt: skip
def test_flags_that_cannot_be(monkeypatch, capsys, line, named):
    """One sentence that names the flag, exit code 2, and no run."""
    monkeypatch.setattr(methods, "one_seed", None)
    monkeypatch.setattr("sys.argv", ["methods", *line.split()])
    with pytest.raises(SystemExit) as stopped:
        methods.main()
    assert stopped.value.code == 2 and f"error: {named} " in capsys.readouterr().err


def test_sizes_are_searched_by_the_same_rule(trials, tmp_path, monkeypatch, capsys):
    """--tune --skills: every pre-training has the number of skills, and MHR its heads; each line says so."""
    monkeypatch.setattr("sys.argv", "methods --tune --skills 2 3 --methods MHR Poly LoRA-big --jobs 1".split())
    methods.main()
    lines = capsys.readouterr().out.splitlines()[1:]
    assert {line.split()[0] for line in lines} == {"MHR", "Poly"}
    sizes = {(line.split()[0], *re.findall(r"--(?:skills|heads)=\d+", line)) for line in lines}
    assert sizes == {(m, f"--skills={s}", *more) for s in (2, 3) for m, more in (("MHR", ["--heads=16"]), ("Poly", []))}
    assert sum(line.endswith("<-") for line in lines) == 2 * 2 * 3


@pytest.mark.parametrize("method", mixing.METHODS)
def test_windows_are_compared_by_runs_that_are_alike(monkeypatch, tmp_path, method):
    """experiments/mixing.py: the recipe's window is run by the table's commands, another one in the same settings."""
    modules = {"train.py": (train, PRETRAINING), "adapt.py": (adapt, FEW_SHOT)}
    made, own = [], {"output_dir", "keep_every", "checkpoint", "window"}

    def begin(module, flags):
        cfg = module.make_config(**flags)
        made.append(
            {name: list(value) if name == "split" else value for name, value in vars(cfg).items() if name not in own}
        )
        Path(cfg.output_dir).mkdir()
        write_config(Path(cfg.output_dir), cfg)
        write_json(Path(cfg.output_dir, "result.json"), {"mean": 1.0})
        return cfg

    def run(script, flags, result):
        if script in modules:
            module, recipes = modules[script]
            begin(module, explicit_flags(module.Config, recipes, flags) | {"device": "cpu"})
        else:
            monkeypatch.setattr("sys.argv", ["mixing", *flags])
            mixing.main()
        return read_json(result) | {"commit": "abc"}

    for module, _ in modules.values():
        monkeypatch.setattr(module, "main", partial(begin, module))
    for module in (methods, mixing):
        monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(mixing, "RUNS", tmp_path)
    for window in (WINDOW, 50):
        assert mixing.one(method, window, 3) == {"seen": 1.0, "held-out": 1.0, "commit": "abc"}
    assert made[:2] == made[2:]
    configs = map(read_json, tmp_path.glob("*/config.json"))
    assert sorted(config["window"] for config in configs if "window" in config) == [WINDOW, 50]


def test_the_table_of_windows(monkeypatch):
    monkeypatch.setattr(mixing, "one", lambda m, w, s: {"seen": 80.0 + s, "held-out": 60.0 + 2 * s, "commit": f"c{w}"})
    (head, *lines), commits = mixing.scores(jobs=1)
    assert lines == [(m, str(w), "81.0 ± 1.0", "62.0 ± 2.0") for m in ("MHR", "Poly") for w in (1, WINDOW, 50)]
    assert len(head) == 4 and commits == f"c1, c50, c{WINDOW}"
