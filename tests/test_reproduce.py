"""Claims are judged by the rule that verdicts.py states, from values that are made once, by commands that exist."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import adapt
import train
from experiments import claim_figures, claims, methods, reproduce, scarce, verdicts
from experiments.verdicts import CLAIMS, MEASURES
from plumbing.errors import RunError, UserError
from plumbing.flags import explicit_flags, unused
from recipes import FEW_SHOT, PRETRAINING, VARIANTS
from tests.helpers import check_legible, drawn
from tools import figures

VALUES = st.lists(st.floats(0, 100).map(lambda x: round(x, 3)), min_size=5, max_size=5).map(np.array)


# --- The rule ---------------------------------------------------------------------------------------------------------


@given(VALUES, VALUES)
def test_above_is_a_paired_t_test(a, b):
    """a > b holds exactly if the two-sided p is below 0.05 and the mean difference is positive."""
    if np.ptp(a - b) < 1e-6:
        return
    p, d = stats.ttest_rel(a, b).pvalue, (a - b).mean()
    if abs(p - 0.05) > 1e-6:
        expected = "undecided" if p > 0.05 else "holds" if d > 0 else "fails"
        assert verdicts.judge(a, ">", b).says == expected
    assert verdicts.judge(a, ">", b).difference == pytest.approx(d)


@given(VALUES, VALUES)
def test_the_rule_is_even_handed(a, b):
    """Swapping the sides turns > around and does not change ~."""
    turned = {"holds": "fails", "fails": "holds", "undecided": "undecided"}
    assert verdicts.judge(b, ">", a).says == turned[verdicts.judge(a, ">", b).says]
    assert verdicts.judge(b, "~", a).says == verdicts.judge(a, "~", b).says


@given(VALUES, VALUES, st.sampled_from([">", "<=", "~"]), st.floats(-50, 50).map(lambda x: round(x, 3)))
def test_a_common_shift_changes_nothing(a, b, relation, shift):
    """Seeds that are harder for both sides change nothing: the test is paired."""
    shifted = verdicts.judge(a + shift, relation, b + shift)
    plain = verdicts.judge(a, relation, b)
    assert shifted.difference == pytest.approx(plain.difference, abs=1e-6)
    if np.ptp(a - b) > 1e-3:
        assert shifted.interval == pytest.approx(plain.interval, abs=1e-6)


NOISE = np.array([-0.2, -0.1, 0.0, 0.1, 0.2])  # mean 0; its 95 % interval is +-0.2


@pytest.mark.parametrize(
    "relation, difference, says",
    [
        (">", 1, "holds"), (">", 0.1, "undecided"), (">", -1, "fails"),
        ("<=", -20, "holds"), ("<=", 1, "holds"), ("<=", 5, "undecided"), ("<=", 6, "fails"),
        ("~", 0, "holds"), ("~", 4, "holds"), ("~", -4, "holds"),
        ("~", 5, "undecided"), ("~", 6, "fails"), ("~", -6, "fails"),
    ],
)  # fmt: skip
def test_each_relation_on_clear_cases(relation, difference, says):
    """With little noise the relations do what their names say, with 5 points for "close"."""
    a, b = np.full(5, 50.0) + difference + NOISE, np.full(5, 50.0)
    assert verdicts.judge(a, relation, b).says == says


def test_noise_leaves_it_undecided():
    """Nothing is decided if five values spread by more than the margin."""
    noisy = 5 + 100 * NOISE
    assert {verdicts.judge(noisy, r, np.zeros(5)).says for r in (">", "<=", "~")} == {"undecided"}


def test_gradients_are_measured_where_a_claim_asks_for_them(workshop):
    """Whatever the flags of the run: tools.analyze takes a minute for them, and a value over training needs them."""
    folder, done = workshop
    names = ["alignment of MHR, mixtures", "usage, 8 skills", "usage, random table", "recovery by Poly"]
    verdicts.make_missing(names, (0,), folder / "claims.jsonl", folder, 1)
    calls = {"MHR": False, "Poly0--lr=0.015--skills": True, "Random": True, "Poly0--lr=0.015/": False}
    for run, without in calls.items():
        (analysis,) = [line for line in done if line[0] == "tools.analyze" and run in f"{line[2]}/"]
        assert ("--no-alignment" in analysis) == without, run


def test_values_without_spread_are_decided():
    """Where all seeds agree to the bit there is no division by zero."""
    a, b = np.full(5, 3.0), np.full(5, 1.0)
    assert [verdicts.judge(a, r, b).says for r in (">", "<=", "~")] == ["holds", "holds", "holds"]
    assert verdicts.judge(b, ">", b).says == "undecided"


@pytest.mark.parametrize(
    "parts, says",
    [(("holds", "holds"), "holds"), (("holds", "fails"), "does not hold here"), (("holds", "undecided"), "undecided")],
)
def test_a_claim_needs_all_its_parts(parts, says):
    """One part that fails is enough, and one that is undecided leaves it open."""
    assert verdicts.verdict([verdicts.Verdict([0.0], 0.0, (0.0, 0.0), part) for part in parts]) == says


def test_an_unknown_relation_is_refused():
    with pytest.raises(ValueError, match="unknown relation"):
        verdicts.judge(np.ones(5), "<", np.zeros(5))


# --- What is claimed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_claims_name_measures_and_figures_that_exist(claim):
    """A slip in a name shows here and not after hours of training."""
    assert set(claims.measures_of(claim)) <= set(MEASURES)
    assert claim.figure in claim_figures.FIGURES
    assert all(relation in (">", "<=", "~") for _, relation, _ in claim.compare)


@pytest.mark.parametrize("name", [name for name, claim in CLAIMS.items() if claim.figure == "dots"])
def test_only_scores_are_drawn_on_an_axis_of_scores(name):
    assert {MEASURES[of].then for of in claims.measures_of(CLAIMS[name])} <= {*VARIANTS, "zero-shot"}


@pytest.mark.parametrize("name, which", [("z", "new task"), ("heads", "trained")])
def test_curves_have_all_measures_of_their_claim(name, which):
    """No measure is left out of the figure."""
    panels = claim_figures.CURVES[which].values()
    drawn = {measure for curves in panels for curve in curves.values() for measure in curve.values()}
    assert drawn == set(claims.measures_of(CLAIMS[name]))


def test_every_measure_is_in_a_claim_and_no_two_are_one():
    """Nothing is trained that no claim asks for."""
    used = {name for claim in CLAIMS.values() for name in claims.measures_of(claim)}
    assert used == set(MEASURES)
    keys = [verdicts.flags_of(measure) for measure in MEASURES.values()]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_the_flags_of_measures_are_flags(measure):
    """train.py and adapt.py take them, and they fit the method."""
    rates, few_shot = verdicts.rates_of(measure)
    flags = [*methods.METHODS[measure.method][0].split(), *rates, *measure.flags.split()]
    given = explicit_flags(train.Config, PRETRAINING, [*flags, "--dataset", "strings"])
    cfg = train.make_config(**given)
    assert unused(cfg, given) == []
    if measure.then in VARIANTS:
        explicit_flags(adapt.Config, FEW_SHOT, [*few_shot[measure.then], "--variant", measure.then])
        assert cfg.method in VARIANTS[measure.then]


def test_one_speed_is_one_speed():
    """The claim about two speeds compares with a Z at the rate of the skills."""
    flags = f"--method poly {methods.RATES['Poly'][0]} {MEASURES['seen tasks, one speed'].flags}".split()
    cfg = explicit_flags(train.Config, PRETRAINING, flags)
    assert cfg["lr_z"] == cfg["lr"]
    usual = explicit_flags(train.Config, PRETRAINING, f"--method poly {methods.RATES['Poly'][0]}".split())
    assert (usual.get("lr_z") or PRETRAINING["strings"]["lr_z"]) > cfg["lr"]  # else nothing is compared


def test_sides_of_comparisons():
    """A measure, the difference of two, a number."""
    measured = {"a": verdicts.Values(np.array([3.0, 5]), []), "b": verdicts.Values(np.array([1.0, 1]), [])}
    assert verdicts.side("a", measured, (0, 1)).tolist() == [3, 5]
    assert verdicts.side("a - b", measured, (0, 1)).tolist() == [2, 4]
    assert verdicts.side(0.9, measured, (0, 1)).tolist() == [0.9, 0.9]


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--seeds", "0", "1"], "--results"),
        (["--seeds", "5", "6", "7"], "--results"),
        ("--seeds 0 1 2 --results results".split(), "--results"),
    ],
)
def test_other_seeds_are_refused_in_results(monkeypatch, capsys, argv, named):
    """results/ holds the values of the seeds that are compared."""
    monkeypatch.setattr("sys.argv", ["reproduce", *argv])
    monkeypatch.chdir(verdicts.ROOT)
    monkeypatch.setattr(reproduce, "make_missing", None)
    with pytest.raises(SystemExit):
        reproduce.main()
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, named",
    [("--jobs 0", "--jobs"), ("--jobs -1", "--jobs"), ("--seeds 0 1 2 2", "--seeds"), ("--seeds -1 1 2", "--seeds"),
     ("--results FILE", "--results FILE"), ("--results FILE/new", "--results"), ("--runs FILE", "--runs FILE"),
     (f"--device cuda --results {verdicts.ROOT / 'results'}", "--device cuda"),
     ("--device cuda --results elsewhere", "--device cuda: give --runs")],
)  # fmt: skip
def test_flags_that_cannot_be(monkeypatch, capsys, tmp_path, line, named):
    """One sentence that names the flag, exit code 2, and no run."""
    (tmp_path / "FILE").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "make_missing", None)
    monkeypatch.setattr("sys.argv", ["reproduce", "--results", "new", *line.split()])
    with pytest.raises(SystemExit) as stopped:
        reproduce.main()
    assert stopped.value.code == 2 and re.search(f"error: {named}[: ]", capsys.readouterr().err)
    assert (tmp_path / "FILE").read_text() == "mine"


def test_a_device_is_used_by_all_runs(monkeypatch):
    """cpu hides the GPUs from the scripts, which take one that they see; cuda needs one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    verdicts.use_device("cpu")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: torch sees no CUDA GPU"):
        verdicts.use_device("cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    verdicts.use_device("cuda")


def test_an_estimate_counts_what_is_missing(workshop, monkeypatch):
    """From the seconds of a step here: 5 pre-trainings for three measures of one run and five seeds, then none."""
    folder, _ = workshop
    monkeypatch.setattr(train, "main", lambda flags: {"seconds_per_step": 0.1} if flags["dry_run"] else None)
    names, path = ["MHR", "MHR-z", "recovery by MHR"], folder / "claims.jsonl"
    says = verdicts.estimate(names, verdicts.SEEDS, path, "cpu", 2)
    assert says.startswith("missing: 5 pre-trainings of 150 s, 10 adaptations of ")
    each, hours, by_two = (
        float(x) for x in re.search(r"adaptations of (\d+) s: ([\d.]+) hours, 2 at a time ([\d.]+)", says).groups()
    )
    assert hours == pytest.approx((5 * 150 + 10 * each) / 3600, abs=0.06) and by_two == pytest.approx(
        hours / 2, abs=0.06
    )
    verdicts.make_missing(names, verdicts.SEEDS, path, folder, 2)
    assert verdicts.estimate(names, verdicts.SEEDS, path, "cpu", 2).startswith("missing: 0 pre-trainings")


def test_values_of_two_devices_are_not_mixed(workshop):
    """A file of values made on CPUs takes none made on a GPU, and the page says where they were made."""
    folder, done = workshop
    path = folder / "claims.jsonl"
    verdicts.make_missing(claims.measures_of(CLAIMS["expert"]), (0, 1, 2), path, folder, 1, "cuda")
    page = reproduce.render(verdicts.read_raw(path), (0, 1, 2), ["expert"], with_history=False)
    assert "hours, runs on a GPU side by side, by the clock" in page and "with 3 runs of every" in page
    before = len(done)
    with pytest.raises(UserError, match="has values made on cuda: give another --results, or --device"):
        verdicts.make_missing(["MHR-z"], (0,), path, folder, 1)
    assert len(done) == before


@pytest.mark.parametrize("method, skills", list(scarce.AT), ids=str)
def test_scarce_skills_have_the_rates_that_were_found(monkeypatch, method, skills):
    """AT is what the search finds in results/trials.jsonl, without a run."""
    monkeypatch.setattr(methods, "pretrain", None)
    monkeypatch.setattr(methods, "adapt", None)
    sizes = (f"--skills={skills}", *methods.SIZED[method])
    best = [line for line in methods.tune(method, Path("unused"), sizes) if line[-1]]
    flags, few_shot = scarce.AT[method, skills]
    assert {line[1] for line in best} == {" ".join((flags, *sizes))}
    assert {line[2]: line[3] for line in best} == few_shot


def test_a_page_made_elsewhere_is_compared(workshop):
    """Beside each comparison that both have made: the difference and the verdict of results/."""
    folder, _ = workshop
    verdicts.make_missing(claims.measures_of(CLAIMS["expert"]), (0, 1, 2), folder / "claims.jsonl", folder, 1)
    raw = verdicts.read_raw(folder / "claims.jsonl")
    page = reproduce.render(raw, (0, 1, 2), ["expert", "mu"], with_history=False).split("# Beside results/")[1]
    committed = verdicts.read_raw(verdicts.ROOT / "results" / "claims.jsonl")
    for compared, ours, theirs in zip(
        CLAIMS["expert"].compare,
        verdicts.judged(CLAIMS["expert"], raw, (0, 1, 2)),
        verdicts.judged(CLAIMS["expert"], committed, verdicts.SEEDS),
        strict=True,
    ):
        (line,) = (line for line in page.splitlines() if f"| {reproduce.worded(*compared)} |" in line)
        assert f"| {ours.difference:+.3f} (" in line and f"| {theirs.difference:+.1f} (" in line
        within = theirs.interval[0] <= ours.difference <= theirs.interval[1]
        same, inside = ("yes" if so else "no" for so in (ours.says == theirs.says, within))
        assert line.endswith(f"| {same} | {inside} |")
    assert "| mu |" not in page and re.search("Those values are of commit .*2288691", page) and "50 batches" in page
    here = reproduce.render(committed, verdicts.SEEDS, list(claims.CLAIMS), with_history=True)
    assert "Beside results/" not in here


def test_one_seed_elsewhere_decides_nothing(workshop, monkeypatch):
    """Its differences stand beside the intervals of results/; of some, one comparison is outside."""
    folder, _ = workshop
    places = ["--results", str(folder), "--runs", str(folder / "runs"), "--jobs", "1"]
    monkeypatch.setattr(figures, "save", lambda figure, stem: None)
    monkeypatch.setattr("sys.argv", ["reproduce", "--seeds", "0", "--claim", *claims.CLAIMS, *places])
    reproduce.main()
    page = (folder / "claims.md").read_text()
    assert "may be true or not. With fewer than 3 seeds all are." in page and "| no interval | undecided |" in page
    verdict_of = re.findall(r"^\| \[[\w-]+\]\(#.*?\) \| (.*?) \|", page, re.M)
    assert len(verdict_of) == len(claims.CLAIMS) and set(verdict_of) == {"undecided"}
    beside = [line for line in page.split("# Beside results/")[1].splitlines() if line.endswith((" yes |", " no |"))]
    assert len(beside) == sum(len(claim.compare) for claim in claims.CLAIMS.values())
    assert "nan" not in page and {line.split(" | ")[-1] for line in beside} == {"yes |", "no |"}


def test_a_claim_leads_to_what_it_is_where_skills_are_scarce(workshop):
    folder, _ = workshop
    names = ["few-shot", "mu", "mu-scarce"]
    measures = [m for name in names for m in claims.measures_of(CLAIMS[name])]
    verdicts.make_missing(measures, (0, 1, 2), folder / "claims.jsonl", folder, 1)
    raw = verdicts.read_raw(folder / "claims.jsonl")
    page = reproduce.render(raw, (0, 1, 2), names, with_history=False)
    parts = verdicts.judged(CLAIMS["mu-scarce"], raw, (0, 1, 2))
    says, hold = verdicts.verdict(parts), [part.says for part in parts].count("holds")
    assert page.count(f"batches: **{says}** ({hold} of 4 comparisons hold), [mu-scarce](#mu-scarce).") == 1
    assert "[few-shot-scarce]" not in page and "**Scarce skills**" in page
    assert "**Scarce skills**" not in reproduce.render(raw, (0, 1, 2), ["mu"], with_history=False)
    complete = reproduce.claims_on_page(raw, (0, 1, 2), [])
    assert "mu-scarce" in complete and "few-shot-told-scarce" not in complete
    assert "Not made yet: scarce, few-shot-scarce, few-shot-told-scarce, z-scarce, heads-scarce" in page


def test_the_page_alone_makes_no_folder_of_runs(monkeypatch, tmp_path):
    """--page, without a raw number: a page on which nothing is made yet, and nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", "reproduce --page --results new --runs runs".split())
    reproduce.main()
    assert [str(path) for path in Path().rglob("*")] == ["new", "new/claims.md"]
    assert Path("new/claims.md").read_text().count("not made yet") == len(claims.CLAIMS)


WHOLE = {
    "flags": "a",
    "seed": 0,
    "value": 1.0,
    "trained": 3,
    "new task": None,
    "seconds": [1.0, 2],
    "commits": ["abc", "def"],
}


@pytest.mark.parametrize(
    "odd",
    ["{", "[]", "\0", "[" * 3000, *(json.dumps(WHOLE | change) for change in (
        {"value": None}, {"value": float("nan")}, {"value": {}}, {"value": {"300": "x"}}, {"trained": "3"},
        {"seconds": [1.0]}, {"seconds": 1}, {"flags": []}, {"seed": "0"}, {"new task": "3"},
        {"commits": "ab"}, {"commits": ["a", 1]}, {"commits": ["a"]},
    )), json.dumps({"flags": "a", "seed": 0, "value": 1.0})],
)  # fmt: skip
def test_a_damaged_raw_file_is_one_sentence(tmp_path, odd):
    """It names the line. Whole lines are read, also values over training."""
    path, over = tmp_path / "claims.jsonl", WHOLE | {"seed": 1, "value": {"300": 0.5}}
    path.write_text("".join(json.dumps(line) + "\n" for line in (WHOLE, over)))
    assert verdicts.read_raw(path) == {("a", 0): WHOLE, ("a", 1): over}
    with open(path, "a") as file:
        file.write(odd + "\n")
    with pytest.raises(UserError, match=f"{path}:3 is damaged"):
        verdicts.read_raw(path)


def test_a_value_of_earlier_code_is_not_made_again_in_results(monkeypatch, tmp_path):
    """In results/ a lost line comes from git; elsewhere, and with today's values, it is made."""
    made = []
    monkeypatch.setattr(verdicts, "side_by_side", lambda make, groups, jobs: made.extend(groups))
    monkeypatch.setattr(verdicts, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    here = tmp_path / "results" / "claims.jsonl"
    with pytest.raises(UserError, match="lacks Poly of seed 0, which earlier code made: take its line from git"):
        verdicts.make_missing(["Poly"], (0,), here, tmp_path, 1)
    verdicts.make_missing(["Poly, s = 2"], (0,), here, tmp_path, 1)
    verdicts.make_missing(["Poly"], (0,), tmp_path / "claims.jsonl", tmp_path, 1)
    assert len(made) == 2


# --- Values and page --------------------------------------------------------------------------------------------------


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """reproduce.py with runs that return at once: (folder, what was run)."""
    done = []

    def pretrain(name, seed, root, extra=()):
        done.append(("train", name, seed, extra))
        folder = root / f"{name}{seed}{''.join(extra)}"
        folder.mkdir(parents=True, exist_ok=True)
        counts = {"adapters": 7, "routing": 2}
        return folder, {"mean": 80.0 + seed, "parameters": counts, "seconds": 60.0, "commit": "abc1234"}

    def adapt(checkpoint, variant, seed, extra=()):
        done.append(("adapt", checkpoint.name, variant, extra))
        return {
            "mean": 50.0 + seed,
            "mean_before": 1.0 + seed,
            "parameters": {"adapters": 3, "routing": 1},
            "seconds": 30.0,
            "commit": "def5678",
        }

    def run(script, flags, made):
        done.append((script, *flags))
        base = len(made.parts[-3]) / 100
        steps = [{"step": s, "alignment": s / 1000 + base, "alignment_mixed": 0.5 + base} for s in (300, 600)]
        measures = {"discreteness": 0.9, "sparsity": 0.4, "usage": 0.95}
        recovery = {"correlation": 0.5, "chance_95": 0.1, "low": 0.4, "high": 0.6}
        mean = 12.0 if script == "evaluate.py" else measures
        return {"mean": mean, "over_steps": steps, "recovery": recovery, "commit": "abc1234"}

    for name, fake in (("pretrain", pretrain), ("adapt", adapt), ("run", run)):
        monkeypatch.setattr(verdicts, name, fake)
    return tmp_path, done


def test_a_run_is_made_once_for_all_that_ask_it(workshop):
    """Three measures of one run take one pre-training for each seed, and a second call makes nothing."""
    folder, done = workshop
    arguments = (["MHR", "MHR-z", "MHR-mu"], (0, 1), folder / "claims.jsonl", folder / "runs", 2)
    verdicts.make_missing(*arguments)
    assert sorted(line[:3] for line in done if line[0] == "train") == [("train", "MHR", 0), ("train", "MHR", 1)]
    assert len([line for line in done if line[0] == "adapt"]) == 6
    lines = [json.loads(line) for line in (folder / "claims.jsonl").read_text().splitlines()]
    assert {(line["value"], line["seed"]) for line in lines} == {(50.0, 0), (51.0, 1)}
    assert all(line["trained"] == 9 and line["new task"] == 4 for line in lines)
    assert all(line["commits"] == ["abc1234", "def5678"] for line in lines)
    assert verdicts.hours(lines) * 3600 == 2 * 60 + 6 * 30  # each pre-training once
    again = [line | {"flags": f"{line['flags']}, windows of 8"} for line in lines]
    assert verdicts.hours(lines + again) == 2 * verdicts.hours(lines)  # other code, other runs
    before = len(done)
    verdicts.make_missing(*arguments)
    assert len(done) == before


def test_other_flags_are_another_value(workshop, monkeypatch):
    """A value made at other rates is not used for these."""
    folder, done = workshop
    verdicts.make_missing(["Poly"], (0,), folder / "claims.jsonl", folder, 1)
    monkeypatch.setitem(methods.RATES, "Poly", ("--lr=0.123", methods.RATES["Poly"][1]))
    verdicts.make_missing(["Poly"], (0,), folder / "claims.jsonl", folder, 1)
    assert len([line for line in done if line[0] == "train"]) == 2


def test_zero_shot_takes_the_average_of_routed_methods_only(workshop):
    """0 steps: the score before adaptation, of mu or of the one adapter; else training goes on first."""
    folder, done = workshop
    names = [f"{m}, told, +{k} steps" for k in (0, 100) for m in ("MHR-mu", "LoRA (Shared)")]
    verdicts.make_missing(names, (3,), folder / "claims.jsonl", folder, 1)
    raw = verdicts.read_raw(folder / "claims.jsonl")
    values = [verdicts.collect(raw, [name], (3,))[name].values.tolist() for name in names]
    assert values == [[4.0], [4.0], [12.0], [12.0]]
    assert {line[2] for line in done if line[0] == "adapt"} == {"mu", "all"}
    more = {line[2].split("/")[-1][:3]: line for line in done if line[0] == "train.py"}
    assert "mu" in more["MHR"] and "mu" not in more["LoR"]
    assert all("100" in line for line in more.values())
    assert all(line[line.index("--split") + 1] == "3" for line in done if line[0] == "evaluate.py")


def test_the_page_of_the_results_is_what_its_raw_file_gives():
    """results/claims.md is made from results/claims.jsonl, and every claim has all its values there."""
    raw = verdicts.read_raw(verdicts.ROOT / "results" / "claims.jsonl")
    names = reproduce.claims_on_page(raw, verdicts.SEEDS, [])
    page = reproduce.render(raw, verdicts.SEEDS, names, with_history=True)
    assert (verdicts.ROOT / "results" / "claims.md").read_text() == page and "not made yet" not in page


# What point 22 of results/LOG.md and the notes of experiments/scarce.py found afterwards: a difference of two measures,
# and how they write it with its interval. A measure "a - b" is a difference itself, as in the claims.
AFTERWARDS = [
    ("MHR, s = 2", "MHR, s = 8", "MHR has {:+} ({:.1f} to {:.1f})"),
    ("Poly, s = 2", "Poly, s = 8", "Poly {:+} ({:.1f} to {:.1f})"),
    ("MHR-z, s = 2", "MHR-z, s = 8", "MHR-z's {:+} is within chance ({:.1f} to {:.1f})"),
    ("MHR-z, s = 2", "MHR-z, s = 8", "MHR gains {} ({:.1f} to {:.1f})"),
    ("Poly-z, s = 8", "Poly-z, s = 2", "Poly-z loses {} ({:.1f} to {:.1f})"),
    ("Poly, s = 8", "MHR, s = 8", "with 8 skills MHR is {} below Poly in `all` ({:.1f} to {:.1f})"),
    ("Poly-z, s = 4", "MHR-z, s = 2, h = 2", "2 heads is {} below Poly-z with 4 skills ({:.1f} to {:.1f})"),
    ("MHR-z, s = 2", "Poly-z, s = 2", "lead of 15.0 is there: {:+} ({:.1f} to {:.1f})"),
    ("MHR-mu, s = 2", "Poly-mu, s = 2", "lead in μ, 4.6, is gone: {:+} ({:.1f} to {:.1f})"),
    ("MHR, s = 2, seen", "Poly, s = 2, seen", "its 5.0 is there: {:+} ({:.1f} to {:.1f})"),
    ("MHR, s = 2, h = 8", "Poly, s = 4", "level with Poly's 4 ({:+}, {:.1f} to {:.1f})"),
    ("Poly, told, s = 2", "MHR, told, s = 2", "with 2 skills is {} below Poly in `all` ({:.1f} to {:.1f})"),
    ("MHR-z, told, s = 2", "Poly-z, told, s = 2", "and {} above it in z ({:.1f} to {:.1f})"),
    ("MHR, s = 2 - Poly, s = 2", "MHR, s = 8 - Poly, s = 8", "by {} points in `all` ({:.1f} to {:.1f})"),
    ("MHR-z, s = 2 - Poly-z, s = 2", "MHR-z, s = 8 - Poly-z, s = 8", "and {} in z ({:.1f} to {:.1f})"),
    ("Poly, told", "MHR, told", "With 4 skills (few-shot-told, mu-told) it was {} below"),
    ("MHR-z, told", "Poly-z, told", "below and {} above, with 8 heads"),
    ("Poly, s = 2", "Poly-mu, s = 2", "below `all` by {} (Poly) and"),
    ("MHR, s = 2", "MHR-mu, s = 2", "(Poly) and {} (MHR), with 4 skills"),
    ("Poly, s = 4", "Poly-mu, s = 4", "with 4 skills by {} and"),
    ("MHR, s = 4", "MHR-mu, s = 4", "with 4 skills by 16.2 and {} (means)"),
    ("MHR, s = 2, h = 8, seen", 0.0, "on seen tasks (84.8 with one, {} with 8, 90.6 with 32)"),
    ("MHR, s = 2, h = 32, seen", 0.0, "with 8, {} with 32)"),
    ("MHR-z, s = 2, h = 8", 0.0, "More heads help up to 8 ({}); 32 have 73.9."),
    ("MHR-z, s = 2, h = 32", 0.0, "32 have {}."),
    ("MHR, s = 2, h = 8", 0.0, "and in `all` (78.2, {}, 77.5)"),
    ("MHR, s = 2, h = 32", 0.0, "and in `all` (78.2, 81.0, {})"),
]


@pytest.mark.parametrize("a, b, says", AFTERWARDS)
def test_what_was_looked_at_afterwards_is_in_the_raw_file(a, b, says):
    folder, seeds = verdicts.ROOT / "results", verdicts.SEEDS
    measured = verdicts.collect(verdicts.read_raw(folder / "claims.jsonl"), list(MEASURES), seeds)
    found = verdicts.judge(verdicts.side(a, measured, seeds), ">", verdicts.side(b, measured, seeds))
    pages = " ".join(f"{(folder / 'LOG.md').read_text()} {(folder / 'claims.md').read_text()}".split())
    assert says.format(round(float(found.difference), 1), *found.interval) in pages


def test_the_page_has_every_claim(workshop, monkeypatch):
    """All claims from invented values: verdicts by the rule, a figure for each, none left open."""
    folder, _ = workshop
    monkeypatch.setattr(figures, "save", lambda figure, stem: Path(f"{stem}.png").touch())  # to save time
    verdicts.make_missing(list(MEASURES), (0, 1, 2), folder / "claims.jsonl", folder / "runs", 2)
    reproduce.write_page(folder, (0, 1, 2), list(CLAIMS))
    page = (folder / "claims.md").read_text()
    for name, claim in CLAIMS.items():
        assert f"## {name}\n" in page and claim.says in page
        assert f"claim-{name}.png" in page and (folder / f"claim-{name}.png").exists()
    assert re.search(r"\[recovery\]\(#recovery\) \| holds", page)  # 0.5 against 0.1
    assert re.search(r"\[few-shot\]\(#few-shot\) \| undecided", page)  # all alike
    assert re.search(r"\| MHR \| `--method mhr --heads 8 .*` \| 9 \| 4 \| 51.0 ± 1.0 \|", page)
    assert "Commit abc1234, def5678." in page and "nan" not in page
    assert "Not blind" not in page  # that is the history of results/, not of a page that another makes


@pytest.mark.parametrize("name", CLAIMS)
def test_the_figures_of_the_results_are_legible(name, monkeypatch):
    """From the committed values, or from invented ones for a claim that is not made yet: no text is cut or lies on
    another or on a bar, and the figure says what bars are."""
    raw, names = verdicts.read_raw(verdicts.ROOT / "results" / "claims.jsonl"), claims.measures_of(CLAIMS[name])
    measured = verdicts.collect(raw, names, verdicts.SEEDS)
    if measured.keys() != set(names):
        assert name in scarce.CLAIMS
        draw = np.random.default_rng(0).normal
        lines = [{"value": {"300": k / 9, "600": k / 8}} for k in range(5)] if name == "alignment-scarce" else []
        measured = {m: verdicts.Values(draw(50 + 2 * k, 4, 5), lines) for k, m in enumerate(names)}
    figure = drawn(monkeypatch, lambda: claim_figures.FIGURES[CLAIMS[name].figure](measured, "unused"))
    check_legible(figure)
    assert any("5 seeds" in text.get_text() or "interval" in text.get_text() for text in figure.texts)


def test_a_score_span_of_noise_is_shown_as_small(monkeypatch):
    """A tenth of a point is a two hundredth of the axis, or less."""
    measured = {name: verdicts.Values(np.array([50, 50.1, 50.2]) + k / 10, []) for k, name in enumerate("ab")}
    figure = drawn(monkeypatch, lambda: claim_figures.draw_dots(measured, "unused", claim_figures.SCORE))
    low, high = figure.axes[0].get_xlim()
    assert high - low >= 20 and low < 50 < high


def test_a_measure_that_is_undefined_is_one_sentence(workshop, monkeypatch):
    """A run whose Z did not move has no recovery: its name and the reason, no traceback and no line."""
    folder, _ = workshop
    undefined = {"recovery": {"undefined": "all pairs of tasks are equally similar"}, "commit": "abc1234"}
    monkeypatch.setattr(verdicts, "run", lambda *_: undefined)
    with pytest.raises(RunError, match=r"recovery.correlation is undefined \(all pairs"):
        verdicts.make_missing(["recovery by Poly"], (0,), folder / "claims.jsonl", folder, 1)
    assert not (folder / "claims.jsonl").exists()


def test_the_page_tells_what_is_not_made(workshop):
    """A claim that lacks one seed of one measure is named, and not judged by the others."""
    folder, _ = workshop
    names = claims.measures_of(CLAIMS["expert"])
    verdicts.make_missing(names, (0, 1), folder / "claims.jsonl", folder, 1)
    verdicts.make_missing(names[1:], (2,), folder / "claims.jsonl", folder, 1)
    reproduce.write_page(folder, (0, 1, 2), ["expert"])
    assert "| expert | not made yet |" in (folder / "claims.md").read_text()
