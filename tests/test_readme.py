"""The README is a claim: what it names exists, its commands parse, its code runs, and the gate calls its test line."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
import torch

import adapt
from plumbing.flags import explicit_flags
from recipes import FEW_SHOT, PRETRAINING, VARIANTS
import recipes
from tools import analyze
from tools import export

import evaluate

import train
from experiments import babyai
from experiments.claims import CLAIMS
from experiments.methods import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAPERS = (ROOT / "papers.md").read_text()
FILES = re.findall(
    r"^\| ((?:`[\w.]+/?`(?:, )?)+) \|", README.split("## Files")[1].split("\n## ")[0], re.M
)  # first cells
RECIPES = {
    "train.py": PRETRAINING,
    "adapt.py": FEW_SHOT,
    "evaluate.py": {},
    "export.py": {},
    "analyze.py": {},
    "-m experiments.babyai": {},
}
CONFIGS = {
    "train.py": train.Config, "adapt.py": adapt.Config, "evaluate.py": evaluate.Config, "export.py": export.Config,
    "analyze.py": analyze.Config, "-m experiments.babyai": babyai.Config,
}  # fmt: skip


def commands() -> list[tuple[str, list[str]]]:
    """Every `python SCRIPT.py FLAGS` (or -m) of the documents, also inside && chains, as (script, flags)."""
    paths = [ROOT / "assets" / "tiny" / "README.md", ROOT / "benchmarks" / "README.md", *ROOT.glob("results/*.md")]
    texts = [README, PAPERS, *(path.read_text() for path in paths)]
    found = [m for text in texts for m in re.findall(rf"python ({'|'.join(map(re.escape, CONFIGS))})([^&`#\n]*)", text)]
    for variable, value in {"$method": "mhr", "$variant": "z", "$seed": "0"}.items():
        found = [(script, flags.replace(variable, value)) for script, flags in found]
    return [(script, flags.split()) for script, flags in found]


@pytest.mark.parametrize("script, flags", commands())
def test_every_command_of_the_documents_parses(script, flags):
    flags = [flag.replace("runs/*", "runs/a") for flag in flags]
    known = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(CONFIGS[script])}
    assert {flag for flag in flags if flag.startswith("--")} - {"--help"} <= known
    if "--help" not in flags:
        explicit_flags(CONFIGS[script], RECIPES[script], flags)


def test_the_main_command_is_the_recipes_own():
    """The README's first command uses defaults: its output folder is the one that its second command reads."""
    cfg = train.make_config(method="mhr", heads=8, dataset="strings")
    assert f"adapt.py --checkpoint {cfg.output_dir}" in README


def test_everything_in_the_tables_exists():
    for name in (name for names in FILES for name in re.findall(r"`([^`]+)`", names)):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(test_\w+\.py)`", README):
        assert (ROOT / "tests" / name).exists(), name
    for module, attribute in re.findall(r"`([a-z][a-z0-9]+)\.(\w+)`", README):
        if attribute != "py" and (ROOT / f"{module}.py").exists():
            assert hasattr(importlib.import_module(module), attribute), f"{module}.{attribute}"


def test_the_map_of_the_papers_names_what_exists():
    """Each function, test and file of papers.md is there, and each claim that its commands name."""
    named = re.findall(r"`((?:[a-z0-9_]+\.)+\w+)`", PAPERS)
    assert len(named) > 40
    for name in named:
        if name.rsplit(".", 1)[1] in ("py", "md"):
            assert (ROOT / "tests" / name).exists() or (ROOT / name).exists(), name
            continue
        parts = name.split(".")
        depth = 2 if parts[0] == "baselines" else 1
        found = importlib.import_module(".".join(parts[:depth]))
        for part in parts[depth:]:
            found = getattr(found, part)
    for file, test in re.findall(r"`(test_\w+\.py)::(\w+)`", PAPERS):
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), test
    for path in re.findall(r"`(\w+/\w+\.\w+)`", PAPERS):
        assert (ROOT / path).exists(), path
    for names in re.findall(r"experiments\.reproduce --claim ((?:[a-z][\w-]* ?)+)", PAPERS + README):
        assert set(names.split()) <= {"all", *CLAIMS}, names


def test_every_equation_of_the_papers_has_a_line():
    """Polytropon's seven numbered ones; all tables and figures, each with a command. Every line has a test."""
    equations, tables = PAPERS.split("## Equations")[1].split("## Tables and figures")
    assert all(f"| Pol eq. {k}, " in equations for k in range(1, 8))
    assert equations.count("| `test_") == sum(line[:2] == "| " for line in equations.splitlines()) - 1
    lines = [line for line in tables.splitlines() if line[:2] == "| "][1:]
    assert all("`test_" in line and line.rsplit("|", 2)[1].strip(" `") for line in lines)
    firsts = " ".join(line.split("|")[1] for line in lines)
    for paper, figures, numbers in (("Pol", 7, 5), ("MHR", 4, 6), ("MHR 2022", 1, 4)):
        for kind, count in (("Fig.", figures), ("Tab.", numbers)):
            found = {int(k) for k in re.findall(rf"\b{paper} {kind} (\d)", firsts)}
            assert found == set(range(1, count + 1)), (paper, kind)


def test_the_method_table_is_whole():
    """Each method has a line with the variants that it can be adapted by."""
    lines = re.findall(r"^\| ((?:`[\w-]+`(?:, )?)+)(?: \(.*?\))? \|.*\| (.*?) \|$", README.split("## Methods")[1], re.M)
    table = {m: set(re.findall(r"\b(all|z|mu|lora)\b", v)) for names, v in lines for m in re.findall(r"[\w-]+", names)}
    fits = {v: set(methods) for v, methods in VARIANTS.items()}
    assert set(table) == set(recipes.METHODS)
    for method, variants in table.items():
        assert variants == {v for v, methods in fits.items() if method in methods}, method


def test_the_table_of_results_is_that_of_the_results():
    """The README's scores and parameters, line by line, are those that results/methods.md has as the command printed
    them; the names are those of METHODS."""
    printed = (ROOT / "results" / "methods.md").read_text().split("    method  ")[1].split("\n\n")[0].splitlines()[1:]
    printed = [re.split(r"\s{2,}", line.strip()) for line in printed]
    section = README.split("## All methods in one table")[1].split("\n## ")[0]
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "]
    assert len(shown) - 1 == len(printed) == sum(len(variants) for _, variants in METHODS.values())
    for (name, variant, *cells), (plain, its, *values) in zip(shown[1:], printed, strict=True):
        assert name.replace("³", "^3").split(",")[0] in plain and variant.replace("μ", "mu") == its
        assert [cell or "0" for cell in cells] == [value.replace("+-", "±") for value in values]
    assert [(name, variant) for name, variant, *_ in printed] == [(n, v) for n, (_, vs) in METHODS.items() for v in vs]


def test_the_verdicts_are_those_of_the_claims():
    """The README names each claim once, with the verdict and the count that results/claims.md has."""
    page = (ROOT / "results" / "claims.md").read_text()
    judged = re.findall(r"^\| \[([\w-]+)\]\(#\1\) \| (.*?) \| (\d+ of \d+) \|", page, re.M)
    section = README.split("## What we found")[1].split("\n## ")[0]
    shown = re.findall(r"\[([\w ]+)\]\(results/claims\.md#([\w-]+)\), (\d+ of \d+)", section)
    assert sorted(judged) == sorted((name, says, held) for says, name, held in shown)
    assert {name for name, _, _ in judged} == set(CLAIMS)


def test_the_numbers_of_what_we_found_are_those_of_the_claims():
    """Each "measure mean ± std" below the table is that of results/claims.md; the figures are there."""
    page = (ROOT / "results" / "claims.md").read_text()
    section = " ".join(README.split("## What we found")[1].split("\n## ")[0].split())
    found = {line.split(" | ")[0].strip("| "): line.split(" | ")[-1].strip(" |")
             for line in page.splitlines() if re.search(r" ± [\d.]+ \|$", line)}  # fmt: skip
    numbers = re.findall(r"\d+\.\d+ ± \d+\.\d+", section)
    named = [(name, value) for name, value in found.items() if re.search(rf"{re.escape(name)} {value}", section)]
    assert len(named) >= 8 and {value for _, value in named} == set(numbers)
    assert f"with {1728:,} parameters a task" in section and re.search(r"\| MHR-z \| .*\| 1,728 \|", page)
    below = re.search(r"^\| MHR > Poly \| .* \| undecided \| (.*) \|$", page, re.M).group(1).split()
    assert "MHR 77.5 ± 4.7 is below Poly in each seed (undecided)" in section and all(float(d) < 0 for d in below)
    for figure in re.findall(r'src="(.*?)"', section):
        assert (ROOT / figure).exists()


def babyai_tables(name: str) -> tuple[dict[tuple[str, str], list[str]], dict[str, list[str]]]:
    """results/NAME.md: {(level, run): cells of the table at equal episodes}, {run: cells of the table of runs}."""
    lines = re.findall(r"^    ((?!all:)\S.*)", (ROOT / "results" / f"{name}.md").read_text(), re.M)
    rows = [re.split(r" {2,}", line) for line in lines]
    split = next(k for k, row in enumerate(rows) if row[:2] == ["run", "seeds"])
    return {(level, run): cells for level, run, *cells in rows[1:split]}, {run: row for run, *row in rows[split + 1 :]}


BABYAI = pytest.mark.parametrize(("name", "rate"), [("babyai-curves", "2e-4"), ("babyai-paper-rate", "1e-4")])


def babyai_page() -> str:
    return " ".join((ROOT / "results" / "babyai.md").read_text().split())


def mean_and_spread(cell: str) -> tuple[float, float]:
    mean, std = map(float, cell.split(" +- "))
    return mean, std


@BABYAI
def test_the_levels_that_babyai_reaches(name, rate):
    """Of results/babyai.md: success above 0.99 over 1,000 and 100, trials, frames and settings are its tables'."""
    text, (levels, runs) = babyai_page(), babyai_tables(name)
    over = [{}, {}]
    for (level, run), cells in levels.items():
        for reached, cell in zip(over, cells[:2], strict=True):
            if seeds := sum(episodes != "-" for episodes in cell.split(" / ")):
                reached.setdefault(level, {})[run] = f"{run} ({seeds} of {runs[run][0]})"
    said = [f"{'all levels together' if x == 'all' else x} by {', '.join(y.values())}" for x, y in over[1].items()]
    assert f"At {rate}: {'; '.join(said)}." in text
    if rate == "2e-4":  # "every method reaches every level in at least one seed"
        assert over[0].keys() == {level for level, _ in levels} and all(
            y.keys() == runs.keys() for y in over[0].values()
        )
    else:
        assert over[0] == {"GoToObj": {"private": "private (2 of 2)"}}
    trials = {run: mean_and_spread(cells[5])[0] for (level, run), cells in levels.items() if level == "all"}
    lowest, second, *_, highest = sorted(trials.values())
    best = ", ".join(run for run in trials if trials[run] == highest)
    assert f"to {highest} % ({best})" in text and f"{lowest} % ({min(trials, key=trials.get)}" in text
    assert rate == "1e-4" or f"the second lowest {second};" in text
    assert f" width=32 lr={float(rate)} " in (ROOT / "results" / f"{name}.md").read_text().split("    all:")[1]
    (frames,), (episodes,) = {cells[2] for cells in runs.values()}, {x[2] for (y, _), x in levels.items() if y == "all"}
    assert f"at {rate} {frames} frames a run, {episodes} episodes" in text and {x[0] for x in runs.values()} == {"2"}


@BABYAI
def test_the_order_of_babyais_methods(name, rate):
    """Of results/babyai.md: both orders, and what is said of single methods and of seeds, are those of its tables."""
    text, (levels, rows) = babyai_page(), babyai_tables(name)
    so_far = {level: {y: mean_and_spread(c[3]) for (x, y), c in levels.items() if x == level} for level, _ in levels}
    order = sorted(so_far["all"], key=lambda run: -so_far["all"][run][0])
    assert f"At {rate}: {', '.join('{} {} ± {}'.format(x, *so_far['all'][x]) for x in order)}." in text
    assert max(so_far["GoToObj"].items(), key=lambda run: run[1])[0] == "private"
    assert min(so_far["GoToRedBall"].items(), key=lambda run: run[1])[0] == "private"
    to = {run: cells[0].replace(",", "").split(" / ") for (level, run), cells in levels.items() if level == "all"}
    thousands = {run: sum(map(int, seeds)) / 2000 for run, seeds in to.items() if "-" not in seeds}
    sooner = sorted(thousands, key=thousands.get)
    for ranks in filter(None, (order, sooner)):
        assert ranks[-1] != "private" and ranks.index("dense") < ranks.index("skilled")
        assert ranks.index("skilled") > max(ranks.index("shared"), ranks.index("expert"))
    paper = [rows[run][-1] for run in ("dense", "skilled", "shared", "expert")]
    said = "dense {:.1f}, skilled {:.1f}, shared {:.1f}, expert {:.1f}, private above 6;"
    assert said.format(*(int(cell.replace(",", "")) / 1e6 for cell in paper)) in text
    assert rows["private"][-1] == "> 6,000,000" and rows["mhr"][-1] == "-"
    means = [mean for mean, _ in so_far["all"].values()]
    apart = sum(std * 2**0.5 > max(means) - min(means) for _, std in so_far["all"].values())  # of two seeds
    single, skilled = (so_far["all"][run] for run in ("single-speed", "skilled"))
    if rate == "2e-4":
        assert (
            f"At 2e-4: {', '.join(f'{run} {thousands[run]:.1f}' for run in sooner)}; single-speed in one seed" in text
        )
        assert [run for run in to if to[run].count("-") == 1] == ["single-speed"] and single < skilled
        assert f"two seeds of {apart} of the {len(means)} methods lie further apart" in text
    else:
        assert not thousands and all(seeds == ["-", "-"] for seeds in to.values()) and single > skilled
        low, high = ([mean + sign * std / 2**0.5 for mean, std in (so_far["all"][x] for x in ("dense", "skilled"))]
                     for sign in (-1, 1))  # fmt: skip
        assert low[0] > high[1]  # "dense and skilled do not overlap"


def test_what_is_said_of_babyais_speed():
    """Of results/babyai.md: frames per second, shares of time and hours are those of its two tables of runs."""
    text = babyai_page()
    rows = [row for name in ("babyai-curves", "babyai-paper-rate") for row in babyai_tables(name)[1].values()]
    speeds = [int(row[3]) for row in rows]
    mean, slowest, fastest = round(sum(speeds) / len(speeds)), min(speeds), max(speeds)
    assert f"{mean} frames a second in the mean, {slowest} to {fastest} by method" in text
    assert f"for two cores, is {2 * mean:,}, {2 * slowest:,} to {2 * fastest:,}." in text
    shares = [[int(row[k]) for row in rows] for k in (4, 5, 6)]
    said = [f"{min(x)} to {max(x)}" for x in shares]
    assert "environments are {} %, acting {} %, learning {} %, the slowest part".format(*said) in text
    hours = sum(int(row[0]) * int(row[2].replace(",", "")) / int(row[3]) for row in rows) / 3600
    assert f"{hours:.1f} hours of runs, two at a time: {hours / 2:.1f} by the clock" in text
    assert min(shares[2]) > 50


def test_every_module_is_in_the_file_table():
    listed = {name for names in FILES for name in re.findall(r"`([^`]+)`", names)}
    assert {path.name for path in ROOT.glob("*.py")} <= listed


def test_the_code_block_runs(tmp_path, monkeypatch):
    """The README's Python block, with a small T5 as `model` and a random batch."""
    from transformers import T5Config, T5ForConditionalGeneration

    monkeypatch.chdir(tmp_path)
    small = T5Config(
        vocab_size=99, d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=1, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )  # fmt: skip
    ids = torch.randint(1, 99, (4, 5))
    scope = {"model": T5ForConditionalGeneration(small), "batch": {"input_ids": ids, "labels": ids}}
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(block, scope)
    assert (tmp_path / "adapter.safetensors").stat().st_size > 0


def test_short_enough_to_be_read():
    assert len(README.splitlines()) <= 260


def test_the_gate_calls_the_test_line():
    lines = [line.strip() for line in README.splitlines() if re.match(r" *pip install .*pytest", line)]
    assert len(lines) == 1
    assert 'eval "$line"' in (ROOT / ".ci" / "run").read_text()  # .ci/run reads the line from the README itself


def test_what_the_readme_says_of_the_cost():
    """Its ranges are those of results/bench.md, of batches of more than one example and fewer than 512 tokens."""
    page = (ROOT / "results" / "bench.md").read_text()
    table = page.split("## A training step, a batch of mixed tasks")[1].split("##")[0].strip("\n").split("\n\n")[0]
    head, *lines = [re.split(r" {2,}", line.strip()) for line in table.splitlines()]
    ranges = {}
    for name in ("LoRA", "MHR", "PEFT Poly"):
        cells = [line[1 + head.index(name)] for line in lines if not re.search(r"b=1 |l=512", line[0])]
        numbers = [cell.split()[0] for cell in cells]
        ranges[name] = f"{min(numbers)} to {max(numbers)}"
    assert len(lines) == 9
    says = "LoRA {}, MHR {}, PEFT's Poly {}, training in full {}".format(*ranges.values(), lines[0][8 - 1].split()[0])
    assert says in " ".join(README.split())
    assert all(float(line[5].split()[0]) < float(line[6].split()[0]) for line in lines)  # MHR, PEFT's Poly
