"""The rooms of the house: what may import what, drawn from the code itself, also from imports inside functions."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONCEPTS = "lora ia3 sft poly mhr inject".split()
FLOORS = [  # from the ground up; a file imports only from floors below, or from files before it on its own floor
    [*CONCEPTS, "layers", "recipes"],
    ["plumbing"]
    + [
        f"plumbing.{x}"
        for x in "errors flags processes folders tables machine checkpoint adafactor ahead graph".split()
        + "large backbones run tasks".split()
    ],
    ["data"],
    [f"benchmarks.{x}" for x in "tables metrics choices strings t0 superni crossfit".split()] + ["benchmarks"],
    [f"baselines.{x}" for x in "fixed task_moe hyperformer adapter_soup".split()],
    ["methods"],
    ["scoring"],
    ["train"],
    ["adapt"],
    ["evaluate"],
    [
        f"tools.{x}"
        for x in "measures figures compare count_parameters estimate_memory cards layouts export show analyze".split()
    ],
    [
        f"experiments.{x}"
        for x in "commands methods claims scarce verdicts claim_figures reproduce real_runs real_command real".split()
        + "zero_shot babyai bench larger mixing gpu_items gpu".split()
    ],
    [f"examples.{x}" for x in "own_model hf_trainer".split()],
    [f"tests.stress.{x}" for x in "kills targets faults longrun scale".split()],
    [f"docs.{x}" for x in "formulas annotate picture walkthrough render_walkthrough".split()],  # for readers
]
PLACES = {name: (floor, place) for floor, names in enumerate(FLOORS) for place, name in enumerate(names)}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def modules() -> dict[str, Path]:
    """{name: file} of all own code but the tests; an __init__.py that only says what its folder is is left out."""
    folders = ("", "plumbing", "benchmarks", "baselines", "tools", "experiments", "examples", "tests/stress", "docs")
    paths = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    return {module_of(path): path for path in paths if len(ast.parse(path.read_text()).body) > 1}


def imported(path: Path) -> set[str]:
    """The own modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inside & PLACES.keys() or {node.module}
    return names & PLACES.keys()


def test_every_file_has_its_place():
    assert modules().keys() == PLACES.keys()


def test_imports_go_downward_only():
    upward = {
        f"{name} imports {other}, which is not below it"
        for name, path in modules().items()
        for other in imported(path)
        if PLACES[other] >= PLACES[name]
    }
    assert not upward


def test_a_concept_file_imports_no_sibling():
    """Each can be copied alone, with torch (inject.py: and safetensors) installed."""
    assert not {name: siblings for name in CONCEPTS if (siblings := imported(ROOT / f"{name}.py"))}


def test_plumbing_that_is_read_before_the_flags_loads_no_torch():
    """Files that a script imports before it reads its flags, so that --help answers at once."""
    early = ("errors", "flags", "processes", "folders", "tables")
    for path in [ROOT / "recipes.py", *(ROOT / "plumbing" / f"{name}.py" for name in early)]:
        tops = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {(node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) for node in tops}
        assert not {name for name in names if name.split(".")[0] in ("torch", "transformers", "datasets", "tqdm")}, path


def test_the_root_is_the_table_of_contents():
    """What lies in the root is what the README's table of files names, and nothing else is Python there.

    docs/, pages for readers, is as well found by a link in its text.
    """
    table = (ROOT / "README.md").read_text().split("## Files")[1].split("\n## ")[0]
    cells = re.findall(r"^\| ((?:`[\w./]+`(?:, )?)+) \|", table, re.M)
    named = {name for cell in cells for name in re.findall(r"`([\w./]+)`", cell)}
    here = {path.name for path in ROOT.glob("*.py")}
    assert {name for name in named if name.endswith(".py")} == here and len(here) == 14
    assert {name.strip("/").split("/")[0] for name in named if name.endswith("/")} - {"docs"} == {
        path.name for path in ROOT.iterdir() if path.is_dir() and list(path.rglob("*.py")) or path.name == "assets"
    } - {"runs", "docs"}  # fmt: skip


def test_what_is_for_readers_is_imported_by_nothing():
    importers = {name for name, path in modules().items() if any(x.startswith("docs.") for x in imported(path))}
    assert not importers


@pytest.mark.parametrize(
    "given, then", [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "")]
)
def test_threads_that_wait_do_not_spin_for_long(given, then):
    """Unless the environment says how they wait."""
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import os, plumbing; print(os.environ.get('GOMP_SPINCOUNT', ''))"
    done = subprocess.run([sys.executable, "-c", code], env=clean | given, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == then


COMMANDS = [path for path in (*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("path", sorted(COMMANDS), ids=lambda path: path.stem)
def test_a_command_imports_the_plumbing_before_torch(path):
    """OpenMP reads the environment when torch loads it."""
    nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes]
    first = next(name for name in names if name.split(".")[0] not in sys.stdlib_module_names)
    assert first.startswith("plumbing.")
