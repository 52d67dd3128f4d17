"""The walkthrough: its page is what it prints, its sentences are true, and it is short enough to be read."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
SOURCE = (DOCS / "walkthrough.py").read_text()
NUMBER = re.compile(r"-?\d+\.\d+")


@functools.cache
def page() -> str:
    """The page, made again by the command that its script names; a process of its own, for it sets torch's defaults."""
    command = [sys.executable, DOCS / "render_walkthrough.py"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def output(section: int) -> list[list[str]]:
    """What a section prints: the words of each line."""
    (text,) = re.findall(rf"^## {section}\. .*?```text\n(.*?)```", page(), re.M | re.S)
    return [line.split() for line in text.splitlines()]


def numbers(section: int, name: str) -> list[float]:
    """The decimal numbers of the one line of a section that begins with this name."""
    (line,) = (words for words in output(section) if " ".join(words).startswith(name + " "))
    return [float(word) for word in line if NUMBER.fullmatch(word)]


def test_the_page_is_what_the_file_prints():
    """All text is the same, and numbers to two digits: CPUs round differently."""
    stored = (DOCS / "walkthrough.md").read_text()
    again = "make it again: python docs/render_walkthrough.py > docs/walkthrough.md"
    assert [NUMBER.sub("#", line).split() for line in page().splitlines()] == [
        NUMBER.sub("#", line).split() for line in stored.splitlines()
    ], again
    pairs = zip(NUMBER.findall(page()), NUMBER.findall(stored), strict=True)
    assert all(abs(float(new) - float(old)) < 0.02 for new, old in pairs), again
    for link in re.findall(r"\]\(([\w./]+)\)", stored):
        assert (DOCS / link).exists(), link


def test_it_is_short_and_needs_torch_alone():
    """200 lines; below 90 printed, of 100 columns at most; the last section alone imports from the repository."""
    assert len(SOURCE.splitlines()) <= 200
    printed = [line for text in re.findall(r"```text\n(.*?)```", page(), re.S) for line in text.splitlines()]
    assert len(printed) < 90 and max(map(len, printed)) <= 100
    before = ast.parse(SOURCE.split('print("\\n7.')[0])
    imports = [node for node in ast.walk(before) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {name.name for node in imports for name in node.names} == {"sys", "torch"}


def test_the_traced_numbers_are_right():
    """The block of head 2 by hand, from the numbers that the reader sees: w, mixed A and B, x A B."""
    w = numbers(3, "w")
    A = [[1, 0, 2, 0], [0, 1, 0, 2], [2, 1, -1, 0]]
    B = [[1, 0, 0, 1], [0, 2, 1, 0], [0, 1, -2, 3]]
    mixed = []
    for skills, name in ((A, "A"), (B, "B")):
        printed = numbers(3, name)
        mixed.append([sum(w[3 * (k // 2) + s] * skills[s][k] for s in range(3)) for k in range(4)])
        assert all(abs(a - b) < 0.03 for a, b in zip(mixed[-1], printed, strict=True))
    low = mixed[0][0] + 2 * mixed[0][1] - mixed[0][3]  # x is 1, 2, 0, -1
    assert abs(low - numbers(3, "x A b r")[0]) < 0.05
    assert all(abs(low * b - y) < 0.1 for b, y in zip(mixed[1], numbers(3, "x A B b o"), strict=True))


def test_the_story_is_true():
    """What the prose says of the learning, read from what is printed."""
    end = {name: numbers(4, name)[-1] for name in ("LoRA", "Poly", "Poly, 6 skills", "MHR")}
    assert end["LoRA"] > end["Poly"] > end["Poly, 6 skills"] > end["MHR"] and end["MHR"] < 0.001
    assert numbers(5, "Largest difference, in all 40 tasks:")[0] < 0.01
    (*fast, a, b, c), (*slow, d, e, f), (*quiet, g, h, i) = (numbers(5, k) for k in ("as before", "slow Z", "no noise"))
    assert max(a, b, c) < 0.01 < min(d, e, f, g, h, i), "noise and a fast Z bring sigmoid(Z) to 0 or 1"
    z, both, mu, lora = (numbers(6, name) for name in ("MHR-z", "MHR", "MHR-μ", "LoRA"))
    assert z[0] < 0.001 and min(both[0], mu[0], lora[0]) > 0.1, "4 examples suffice for z"
    assert z[2] > 0.9 and max(both[1], both[2], mu[1], mu[2], lora[1], lora[2]) < 0.001, "other skills"


def test_another_seed_settles_on_wrong_routing():
    """As the prose of section 5 says of manual_seed(1)."""
    assert "with manual_seed(1)" in SOURCE
    source = SOURCE.split('print("\\n5.')[0].replace("manual_seed(0)", "manual_seed(1)")
    done = subprocess.run([sys.executable, "-"], input=source, capture_output=True, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("  MHR "))
    assert float(line.split()[-1]) > 0.2
