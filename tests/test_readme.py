"""The documents: what they name exists, commands parse, code runs, and the gate calls the README's test line."""

import argparse
import ast
import importlib
import re
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import adapt
import evaluate
import recipes
import train
from benchmarks import strings
from experiments import babyai, real_runs
from experiments.claims import CLAIMS
from experiments.methods import METHODS
from experiments.verdicts import judge
from inject import inject
from layers import pattern_of
from plumbing.flags import explicit_flags
from recipes import FEW_SHOT, PRETRAINING, VARIANTS
from tests.helpers import backbone, layer_maker
from tools import analyze, compare, count_parameters, estimate_memory, export, show

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = {path.stem: path.read_text() for path in (ROOT / "docs").glob("*.md")}
PAPERS, METHODS_PAGE = DOCS["papers"], DOCS["methods"]
FILES = re.findall(
    r"^\| ((?:`[\w./]+/?`(?:, )?)+) \|", README.split("## Files")[1].split("\n## ")[0], re.M
)  # first cells
CONFIGS = {  # scripts whose flags are a Config, and its recipes
    "train.py": (train.Config, PRETRAINING), "adapt.py": (adapt.Config, FEW_SHOT), "evaluate.py": (evaluate.Config, {}),
    "-m tools.export": (export.Config, {}), "-m tools.compare": (compare.Config, {}),
    "-m tools.analyze": (analyze.Config, {}), "-m tools.show": (show.Config, {}),
    "-m tools.count_parameters": (count_parameters.Config, {}),
    "-m tools.estimate_memory": (estimate_memory.Config, {}), "-m experiments.babyai": (babyai.Config, {}),
}  # fmt: skip
PARSERS = (  # modules whose main() has a parser of its own
    "experiments.methods", "experiments.reproduce", "experiments.bench", "experiments.gpu", "experiments.larger",
    "experiments.mixing", "experiments.real", "experiments.zero_shot",
    "tests.stress.faults", "tests.stress.longrun", "tests.stress.scale",
)  # fmt: skip
NO_COMMANDS = (  # those of examples take no flags: `test_examples.py` runs them
    "-m pytest", "-m tools.NAME", "-m experiments.NAME", "-m experiments.gpu_items", "-m examples.own_model",
    "-m examples.hf_trainer",
)  # fmt: skip
PLACEHOLDERS = {  # of the documents: what they stand for here
    "$method": "mhr", "$variant": "z", "$seed": "0", "runs/*": "runs/a", "runs/strings-*": "runs/a",
    "runs/babyai-*": "runs/a", "DIR_OR_FILE": "x",
}  # fmt: skip


def texts() -> list[str]:
    """All text with commands: the documents, and the docstrings at the top of files and of each Config."""
    found = [path.read_text() for path in (*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("assets/*/README.md"))]
    for folder in (".", "plumbing", "benchmarks", "tools", "experiments", "tests/stress"):
        for path in (ROOT / folder).glob("*.py"):
            tree = ast.parse(path.read_text())
            classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config"]
            found += [ast.get_docstring(node) or "" for node in (tree, *classes)]
    return found


def commands() -> list[tuple[str, str]]:
    """Every `python SCRIPT.py FLAGS` and `python -m MODULE FLAGS` of the documents, also inside && chains.

    What comes after two spaces is a remark.
    """
    pattern = r"python (\w+\.py|-m [a-z][\w.]+)((?: +[^\s&`#|;()]+)*)"
    lines = set()
    for text in texts():
        for script, flags in re.findall(pattern, text.replace("\\\n", " ")):
            words = re.split("  +", flags)[0].strip(" .:,")
            for placeholder, value in PLACEHOLDERS.items():
                words = words.replace(placeholder, value)
            lines.add((script, words))
    return sorted((script, words) for script, words in lines if script not in NO_COMMANDS)


class Parsed(Exception):
    """The command line was understood."""


@pytest.mark.parametrize(("script", "words"), commands())
def test_every_command_of_the_documents_parses(script, words, monkeypatch):
    argv = shlex.split(words)
    assert script in CONFIGS or script.removeprefix("-m ") in PARSERS, f"{script} is no command"
    if argv == ["--help"]:
        return
    if script in CONFIGS:
        explicit_flags(*CONFIGS[script], argv)
        return
    module, parse = importlib.import_module(script.removeprefix("-m ")), argparse.ArgumentParser.parse_args

    def parse_only(self, *args):
        parse(self, *args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr("sys.argv", [script, *argv])
    with pytest.raises(Parsed):
        module.main()


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
            assert any((ROOT / place / name).exists() for place in ("tests", "docs", "")), name
            continue
        parts = name.split(".")
        depth = 2 if parts[0] in ("baselines", "benchmarks", "plumbing", "tools") else 1
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
    lines = re.findall(r"^\| ((?:`[\w-]+`(?:, )?)+)(?: \(.*?\))? \|.*\| (.*?) \|$", METHODS_PAGE, re.M)
    table = {m: set(re.findall(r"\b(all|z|mu|lora)\b", v)) for names, v in lines for m in re.findall(r"[\w-]+", names)}
    fits = {v: set(methods) for v, methods in VARIANTS.items()}
    assert set(table) == set(recipes.METHODS)
    for method, variants in table.items():
        assert variants == {v for v, methods in fits.items() if method in methods}, method


def test_the_table_of_results_is_that_of_the_results():
    """The scores and parameters of docs/methods.md, line by line, are those that results/methods.md has as the command
    printed them; the names are those of METHODS. The README's six rows are six of these."""
    printed = (ROOT / "results" / "methods.md").read_text().split("    method  ")[1].split("\n\n")[0].splitlines()[1:]
    printed = [re.split(r"\s{2,}", line.strip()) for line in printed]
    section = METHODS_PAGE.split("## All of them on one benchmark")[1].split("\n## ")[0]
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "]
    assert len(shown) - 1 == len(printed) == sum(len(variants) for _, variants in METHODS.values())
    for (name, variant, *cells), (plain, its, *values) in zip(shown[1:], printed, strict=True):
        assert name.replace("³", "^3").split(",")[0] in plain and variant.replace("μ", "mu") == its
        assert [cell or "0" for cell in cells] == [value.replace("+-", "±") for value in values]
    assert [(name, variant) for name, variant, *_ in printed] == [(n, v) for n, (_, vs) in METHODS.items() for v in vs]
    six = re.findall(r"^\| (LoRA|Poly|MHR)(?:-(z|μ))?(.*?) \| (.*?) \| (.*?) \| ([\d,]+) \|$", README, re.M)
    assert len(six) == 6
    for name, variant, more, seen, unseen, trained in six:
        (row,) = [row for row in shown if row[0].startswith(name + more) and row[1] == (variant or "all")]
        assert row[4:] == [trained, seen, unseen]


def test_pairs_of_the_table():
    """The seeds of results/methods.md have the means of its table; its pairs are judged by the rule of the claims. They
    are rounded here. The README's difference is one of them."""
    page = (ROOT / "results" / "methods.md").read_text()
    table, seeds, pairs = page.split("Seed by seed")[0], *page.split("Seed by seed:\n")[1].split("\nand pairs")
    values = {name: np.array(each.split(), float) for name, each in re.findall(r"^ {4}(\S.*?)\s{2,}(.*)$", seeds, re.M)}
    for name, each in values.items():
        method, _, variant = name.replace("-by-task", " by task").replace("μ", "mu").partition("-")
        (said,) = re.findall(
            rf"^ {{4}}{re.escape(method)}\s{{2,}}{variant or 'all'}.*?\s([\d.]+) \+- ([\d.]+)$", table, re.M
        )
        assert [each.mean(), each.std(ddof=1)] == pytest.approx([float(x) for x in said], abs=0.11), name
    lines = re.findall(r"^ {4}(\S.*?) (>|~|<=) (.*?)\s{2,}(\S+)\s+(\S+) to (\S+)\s+(\w+)$", pairs, re.M)
    assert len(lines) == 7
    for a, relation, b, *said, verdict in lines:
        sides = (np.subtract(*(values[m] for m in of.split(" - "))) if " - " in of else values[of] for of in (a, b))
        judged = judge(next(sides), relation, next(sides))
        assert [judged.difference, *judged.interval] == pytest.approx([float(x) for x in said], abs=0.11), (a, b)
        assert judged.says == verdict
    ((below, _),) = re.findall(r"is ([\d.]+) points below in the later runs: MHR\s+(\S+)", README)
    assert f"-{below}" == lines[0][3] and lines[0][:3] == ("MHR", ">", "Poly")


def test_scores_in_sentences_are_those_of_the_table():
    """Each "name mean ± std" of the README's findings is a row of docs/methods.md."""
    section = README.split("## What we found")[1].split("\n## ")[0]
    quoted = re.findall(r"(LoRA|Poly|MHR)(?:-(z|μ))?\s(\d+\.\d ± \d+\.\d)", section)
    assert len(quoted) >= 4
    for name, variant, score in quoted:
        assert re.search(rf"^\| {name}[^|]*\| {variant or 'all'} \|.*\| {score} \|$", METHODS_PAGE, re.M), (name, score)


def test_the_real_model_s_scores_are_those_of_its_page():
    """What constant answers, LoRA, Poly, MHR and their z reach, in one seed, and that one task is most of the gap."""
    page = (ROOT / "results" / "real.md").read_text()
    rows = {}
    floor = re.findall(r"^\| (?:best )?constant answers \| .*? \| .*? \| .*? \| (.*?) \|", page, re.M)
    for name in ("LoRA", "Poly", "MHR", "Poly-z", "MHR-z"):
        seeds, *_, mean, tasks = re.search(
            rf"^\| {name} \| (\d+) \| (.+?) \| (.+?) \| (.+?) \| (.+) \|$", page, re.M
        ).groups()
        rows[name] = (seeds, mean, np.array([float(score) for score in tasks.split(" | ")]))
    assert {seeds for seeds, _, _ in rows.values()} == {"1"}
    for name in ("Poly", "MHR"):
        below = rows["LoRA"][2] - rows[name][2]
        assert below.max() > below.sum() / 2
    text, scores = " ".join(README.split()), {name: mean for name, (_, mean, _) in rows.items()}
    assert "constant answers have {} to {}, Poly-z".format(*floor) in text
    said = ", ".join(f"{name} {scores[name]}" for name in ("Poly-z", "MHR-z", "Poly", "MHR"))
    assert f"{said}, one LoRA {scores['LoRA']}: a gap of mostly one task of" in text
    assert all(mark in page for mark in ("at an edge of what was tried", "*"))


def test_the_two_commands_end_as_recorded():
    """The scores that the README says the two commands print, and their minutes, are those of results/strings.md."""
    record = (ROOT / "results" / "strings.md").read_text()
    before, after, minutes = re.search(r"before adaptation ([\d.]+), after ([\d.]+), .*?; (\d+) min", record).groups()
    (elsewhere,) = re.findall(rf"an AMD EPYC: before adaptation {before}, after ([\d.]+),", record)
    says = " ".join(README.split("## Two commands")[1].split("\n## ")[0].split())
    assert f"before adaptation {before}, after {after}`" in says and f"some {minutes} minutes" in says
    assert f"on another CPU, by rounding alone, {elsewhere})" in says


def test_the_verdicts_are_those_of_the_claims():
    """The verdicts and their counts in the README are those that results/claims.md has."""
    page = (ROOT / "results" / "claims.md").read_text()
    judged = dict(re.findall(r"^\| \[([\w-]+)\]\(#\1\) \| (.*?) \|", page, re.M))
    section = README.split("## What we found")[1].split("\n## ")[0]
    shown = re.findall(r"\[([\w ]+)\]\(results/claims\.md#([\w-]+)\)", section)
    assert len(shown) >= 4 and all(judged[name] == says for says, name in shown)
    count = Counter(says for name, says in judged.items() if name in CLAIMS)  # the papers' own
    holds, fails, undecided = (count[says] for says in ("holds", "does not hold here", "undecided"))
    counts = f"{holds} hold, {fails} do not hold here, {undecided} are undecided"
    few = Counter(says for name, says in judged.items() if name.endswith("-scarce") and says != "not made yet")
    again = f"of {few.total()} with 2 skills {few['does not hold here']} do not, {few['undecided']} are undecided."
    assert again in " ".join(section.split()) and not few["holds"]
    assert judged.keys() >= CLAIMS.keys() and f"{len(CLAIMS)} claims" in section and counts in " ".join(section.split())


def test_scores_in_sentences_are_those_of_the_claims():
    """The numbers without ± in the findings are those of results/claims.md."""
    page = (ROOT / "results" / "claims.md").read_text()
    text = " ".join(README.split("## What we found")[1].split("\n## ")[0].split())

    def row(name: str) -> tuple[str, str]:
        """(numbers for a new task, mean score) of a measure."""
        return re.search(rf"^\| {re.escape(name)} \| `.*?` \| .*? \| (.*?) \| (\S+) ± ", page, re.M).groups()

    mean = lambda name: row(name)[1]  # noqa: E731
    told = [mean(f"{name}, told") for name in ("Poly", "MHR", "Full", "LoRA (Shared)")]
    assert 'operations ("told"): Poly {}, MHR {}, full fine-tuning {}, LoRA {}.'.format(*told) in text
    below, more, above = (
        re.search(rf"^\| MHR{v}, told{size} > Poly{v}, told{size} \| {sign}([\d.]+) \|", page, re.M)[1]
        for v, size, sign in (("", "", "-"), ("", ", s = 2", "-"), ("-z", ", s = 2", r"\+"))
    )
    assert f"#few-shot-told): {below} below, {more} with 2 skills (z: +{above})." in text
    few, many = row("Poly-z, s = 2"), row("MHR-z, s = 2")
    assert f"MHR-z {many[1]} ({many[0]} numbers), Poly-z {few[1]} ({few[0]})." in text
    assert "With 2 skills, and 16 heads, MHR has {}, Poly {} ".format(mean("MHR, s = 2"), mean("Poly, s = 2")) in text
    eight = [mean(f"{name}, s = 8") for name in ("MHR", "Poly", "MHR-z", "Poly-z")]
    assert "With 8 skills MHR has {}, Poly {}; MHR-z {}, Poly-z {}.".format(*eight) in text
    averages = [mean(f"{name}-μ{size}") for size in (", s = 2", "") for name in ("Poly", "Random by task")]
    assert "under a random Z, {} to {}; with 4, {} and {}, that is undecided.".format(*averages) in text
    gains = re.findall(r"^\| MHR(-z)?, s = 2 - Poly(-z)?, s = 2 > .* \| holds \|", page, re.M)
    assert gains == [("", ""), ("-z", "-z")] and "So, not told, MHR gains on Poly where skills" in text
    lead = [r"^\| MHR, s = 2, seen - Poly", r"^\| MHR-μ, s = 2 - Poly"]
    assert all(re.search(rf"{side}.* \| undecided \|", page, re.M) for side in lead) and "in μ that is [u" in text
    for size, says in (("", "undecided"), (", s = 2", "holds")):
        assert re.search(rf"^\| Poly-μ{size} > Random by task-μ{size} \| .* \| {says} \|", page, re.M)


def test_the_example_of_a_task_is_one():
    ((names, given, made),) = re.findall(
        r"string \(([\w, ]+): `task: (\w+)` becomes `(\w+)`\)", " ".join(README.split())
    )
    task = "+".join(names.split(", "))
    assert strings.compose(tuple(names.split(", ")), given) == made
    assert task in [of.name for of in strings.strings().train]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_names_of_layers_are_those_of_the_set(family):
    """docs/own-model.md: the names for a model adapt what `pattern_of("lora", model)` does."""
    page = " ".join(DOCS["own-model"].split())
    start, end = {"llama": ("Llama's family", ";"), "gpt2": ("of GPT-2", ";")}[family]
    names = re.findall(r"`(\w+)`", page.split(start)[1].split(end)[0])
    listed = [
        inject(backbone(family), layer_maker("poly", "lora"), pattern)
        for pattern in (names, pattern_of("lora", backbone(family)))
    ]
    assert listed[0] == listed[1] and len(names) >= 3


def test_the_steps_of_the_real_run_are_those_of_its_budget():
    """docs/gpu.md, for five test tasks."""
    budget, most = real_runs.BUDGETS["papers"], FEW_SHOT["crossfit"]["steps"]
    variants, splits = len(real_runs.METHODS["MHR"][1]), len(budget.splits)
    says = f"{budget.steps:,} steps of 32 and then at most {most * variants * splits * 5:,} few-shot steps of 8"
    assert f"{says} ({variants} variants, {splits} splits, 5 tasks)" in " ".join(DOCS["gpu"].split())


def test_the_code_block_runs(tmp_path, monkeypatch):
    """The README's Python block, with a small T5 as `model`, in evaluation mode as from_pretrained leaves it, and a
    random batch: its routers train."""
    from transformers import T5Config, T5ForConditionalGeneration

    monkeypatch.chdir(tmp_path)
    small = T5Config(
        vocab_size=99, d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=1, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )  # fmt: skip
    ids = torch.randint(1, 99, (4, 5))
    scope = {"model": T5ForConditionalGeneration(small).eval(), "batch": {"input_ids": ids, "labels": ids}}
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(block, scope)
    assert all(router.training for router in scope["routers"](scope["model"]))
    assert (tmp_path / "adapter.safetensors").stat().st_size > 0
    groups = scope["optimizer"].param_groups
    trained = [p for p in scope["model"].parameters() if p.requires_grad]
    assert [group["lr"] for group in groups] == [1e-3, 1e-1] and len(groups[1]["params"]) == len(scope["z"]) > 0
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in trained}


def test_short_enough_to_be_read():
    assert len(README.splitlines()) <= 150 and len(README.split()) <= 1800
    assert max(map(len, README.splitlines())) <= 120


def test_pages_lead_to_each_other():
    """Each page of docs/ begins with the same line, which leads to all; links and pictures are there, with a text."""
    first = DOCS["methods"].splitlines()[0]
    assert {f"{name}.md" for name in DOCS} | {"../README.md"} == set(re.findall(r"\((.*?)\)", first))
    for name, text in DOCS.items():
        assert text.splitlines()[0] == first and text.splitlines()[2].startswith("# "), name
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "results").glob("*.md")]
    for page in pages:
        for alt, target in re.findall(r"(!?\[[^\]]*\])\((?!https?:)([^)#\s]+)[^)]*\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
            assert not alt.startswith("!") or len(alt) > 3, (page.name, target)
        for image in re.findall(r"<img .*?>", page.read_text(), re.S):
            assert re.search(r'alt="[^"]{20,}"', image), (page.name, image)
            assert (page.parent / re.search(r'src="(.*?)"', image)[1]).exists(), (page.name, image)


def test_the_first_screen_leads_to_the_lessons():
    first = README.split("## Two commands")[0]
    assert all(name in first for name in ("docs/mhr.svg", "docs/walkthrough.md", "docs/html/lora.html"))


def test_the_gate_calls_the_test_line():
    lines = [line.strip() for line in README.splitlines() if re.match(r" *pip install .*pytest", line)]
    assert len(lines) == 1
    assert 'eval "$line"' in (ROOT / ".ci" / "run").read_text()  # .ci/run reads the line from the README itself
