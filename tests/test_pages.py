"""docs/: the pictures say what the code computes and can be read; the pages are the files, with their formulas set."""

import importlib.util
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from functools import cache
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
import torch
from matplotlib.ft2font import FT2Font
from torch import nn

import mhr
from lora import LoRA

ROOT = Path(__file__).parents[1]
PICTURE = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "picture.py")))
PICTURES = ("mhr.svg", "variants.svg")
PAGES = ("lora", "poly", "mhr")
SVG = "{http://www.w3.org/2000/svg}"
missing = [name for name in ("pygments", "latex2mathml") if not importlib.util.find_spec(name)]
needs_libraries = pytest.mark.skipif(bool(missing), reason=f"the pages need: pip install {' '.join(missing)}")


def copied(folder: Path) -> Path:
    """What the commands of docs/ read, in a folder of its own, without what they make."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.md")):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("html", "__pycache__", "mhr.svg"))
    shutil.copy(ROOT / "docs" / "mhr.svg", folder / "docs")
    return folder


def command(folder: Path, script: str, **env) -> subprocess.CompletedProcess:
    """`python docs/SCRIPT` in the folder."""
    env = os.environ | env
    return subprocess.run([sys.executable, f"docs/{script}"], cwd=folder, env=env, capture_output=True, text=True)


def contrast(*colours: str) -> float:
    """The ratio of WCAG 2 between two colours #rrggbb."""

    def luminance(colour):
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


def blend(over: str, under: str, opacity: float) -> str:
    pairs = [(int(over[k : k + 2], 16), int(under[k : k + 2], 16)) for k in (1, 3, 5)]
    return "#" + "".join(f"{round(opacity * a + (1 - opacity) * b):02x}" for a, b in pairs)


# ---------------------------------------------------------------------------------------------------- the pictures


@cache
def font(name: str) -> FT2Font:
    return FT2Font(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"))


def width(text: str, size: float, name: str) -> float:
    """In DejaVu, which is wider than the fonts that come before it in the pictures' lists."""
    face = font(name)
    face.set_size(size, 72)
    face.set_text(text)
    return face.get_width_height()[0] / 64


def text_box(text: ET.Element) -> tuple[float, float, float, float]:
    size, long = float(text.get("font-size")), 0.0
    plain = "DejaVuSans-Bold" if text.get("font-weight") else "DejaVuSans"
    for part in text.iter():
        face = "DejaVuSerif-Italic" if part.get("class") == "math" else plain
        long += width(part.text or "", float(part.get("font-size", size)), face)
        long += width(part.tail or "", size, plain) if part is not text else 0
    left = float(text.get("x")) - long * {"start": 0, "middle": 0.5, "end": 1}[text.get("text-anchor")]
    return left, float(text.get("y")) - 0.75 * size, left + long, float(text.get("y")) + 0.25 * size


def rect_box(rect: ET.Element) -> tuple[float, float, float, float]:
    x, y, across, down = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
    return x, y, x + across, y + down


def segments(path: ET.Element) -> list[tuple[float, float, float, float]]:
    """The boxes of a path's pieces, all of them level, upright or of an arrow's head."""
    boxes = []
    for line in path.get("d").strip("MZ").split("M"):
        points = [tuple(map(float, point.split())) for point in line.split("L")]
        boxes += [
            (min(a, c), min(b, d), max(a, c), max(b, d)) for (a, b), (c, d) in zip(points, points[1:], strict=False)
        ]
    return boxes


def apart(a, b) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def inside(a, b) -> bool:
    return b[0] <= a[0] and b[1] <= a[1] and a[2] <= b[2] and a[3] <= b[3]


def elements(name: str) -> tuple[ET.Element, list, list, list]:
    root = ET.parse(ROOT / "docs" / name).getroot()
    found = (list(root.iter(SVG + tag)) for tag in ("text", "rect", "path"))
    texts, rects, paths = found
    return root, [(text, text_box(text)) for text in texts], rects, [box for path in paths for box in segments(path)]


def test_the_pictures_are_what_the_command_draws(tmp_path):
    done = command(copied(tmp_path), "picture.py")
    assert (done.returncode, done.stdout) == (0, "wrote docs/mhr.svg\nwrote docs/variants.svg\n"), done.stderr
    for name in PICTURES:
        assert (tmp_path / "docs" / name).read_bytes() == (ROOT / "docs" / name).read_bytes(), "python docs/picture.py"


@pytest.mark.parametrize("name", PICTURES)
def test_everything_is_inside_the_picture(name):
    root, texts, rects, lines = elements(name)
    card = tuple(map(float, root.get("viewBox").split()))
    assert card[2] == 800 and len(texts) > 20
    for box in (*(box for _, box in texts), *map(rect_box, rects), *lines):
        assert inside(box, card)


@pytest.mark.parametrize("name", PICTURES)
def test_no_text_runs_into_anything(name):
    """Not into another text, nor over the edge of a box, nor over a line; and none is smaller than 11 pixels."""
    _, texts, rects, lines = elements(name)
    for (one, a), (other, b) in combinations(texts, 2):
        assert apart(a, b), ("".join(one.itertext()), "".join(other.itertext()))
    solid = [rect_box(rect) for rect in rects if not rect.get("opacity")]  # the others are tints behind numbers
    for text, box in texts:
        shown = "".join(text.itertext())
        assert float(text.get("font-size")) >= 11
        assert all(apart(box, other) or inside(box, other) for other in solid), shown
        assert all(apart(box, line) for line in lines), shown


def test_two_texts_that_touch_are_found():
    """The two tests above measure: a word is as wide as DejaVu draws it, and its box reaches below the line."""
    text = ET.fromstring('<text x="10" y="20" font-size="10" text-anchor="end">il<tspan class="math">W</tspan></text>')
    left, top, right, bottom = text_box(text)
    assert right == 10 and 10 <= right - left <= 20 and top < 20 < bottom
    assert not apart((0, 0, 2, 2), (1, 1, 3, 3)) and apart((0, 0, 2, 2), (2, 0, 3, 2))


@pytest.mark.parametrize("k", [0, 1])
def test_the_pictures_can_be_read_on_both_cards(k):
    ink = {name: colours[k] for name, colours in PICTURE.INK.items()}
    assert min(contrast(ink["text"], ink["card"]), contrast(ink["soft"], ink["card"])) >= 4.5
    for name in ("line", "skill1", "skill2", "skill3"):
        assert contrast(ink[name], ink["card"]) >= 3, name
        assert contrast(ink["text"], blend(ink[name], ink["card"], 0.4)) >= 4.5, name


@pytest.mark.parametrize("name", PICTURES)
def test_the_card_follows_the_readers_screen(name):
    """The light colours stand outside the media query, the dark ones in it; nothing comes from elsewhere."""
    root = ET.parse(ROOT / "docs" / name).getroot()
    light, dark = root.find(SVG + "style").text.split("@media(prefers-color-scheme:dark)")
    for kind, (day, night) in PICTURE.INK.items():
        assert f".{kind}{{fill:{day}}}" in light and f".{kind}{{fill:{night}}}" in dark
    text = (ROOT / "docs" / name).read_text("utf-8")
    assert "href" not in text and "url(" not in text and "<script" not in text
    assert root.find(SVG + "desc").text == PICTURE.ALT[name] and root.find(SVG + "title").text


def test_the_numbers_of_the_picture_are_those_of_the_code(monkeypatch):
    """z^ and w, from the same logits and noise, as mhr.py computes them; as printed, each row of w sums to 1."""
    logits, noise = torch.tensor(PICTURE.LOGITS), torch.tensor(PICTURE.NOISE)
    monkeypatch.setattr(torch, "rand_like", lambda z: torch.sigmoid(noise))
    on, w = map(torch.tensor, PICTURE.weights())
    torch.testing.assert_close(mhr.relaxed_bernoulli(logits), on)
    torch.testing.assert_close(mhr.soft_partition(logits, "gumbel", sample=True), w)
    assert logits.shape == (PICTURE.SIZES["h"], PICTURE.SIZES["s"]) and PICTURE.TASK < PICTURE.SIZES["t"]
    _, texts, _, _ = elements("mhr.svg")
    shown = ["".join(text.itertext()) for text, _ in texts]
    for value in (*on.flatten().tolist(), *w.flatten().tolist()):
        assert f"{value:.2f}" in shown
    for row in w.tolist():
        assert math.isclose(sum(round(value, 2) for value in row), 1)
        for k, value in enumerate(row):  # the weights before the blocks of A and of B, and for the first head of Poly
            assert shown.count(f"{'+ ' if k else ''}{value:.2f} ×") == (3 if row == w[0].tolist() else 2)


def test_a_mixed_matrix_is_drawn_by_its_weights():
    """Each head's block has its place, and in it each skill the part of its weight; together they fill the matrix."""
    for across in (True, False):
        fills = PICTURE.mixture([[0.25, 0.75], [0.5, 0.5]], across)
        boxes = [(x, y, x + wide, y + tall) for _, x, y, wide, tall in fills]
        assert [round(wide * tall, 6) for *_, wide, tall in fills] == [0.125, 0.375, 0.25, 0.25]
        assert all(apart(a, b) for a, b in combinations(boxes, 2)) and all(inside(box, (0, 0, 1, 1)) for box in boxes)
        first = [box for box in boxes[:2]]  # of head 1: the upper half of A, the left half of B
        assert all(box[3] <= 0.5 if across else box[2] <= 0.5 for box in first)
        assert [fill[0] for fill in fills] == ["skill1", "skill2"] * 2


def test_the_counts_of_the_variants_are_those_of_the_code():
    """Each column's terms, and its formula with the sizes put in, are the parameters that a layer really trains."""
    t, s, h, r, i, o = (PICTURE.SIZES[letter] for letter in "tshrio")
    layer = mhr.MHRLinear(nn.Linear(i, o), LoRA(rank=r), mhr.MHRRouter(t, s, h))
    numels = lambda parameters: sum(p.numel() for p in parameters)  # noqa: E731
    trained = {"pre-training": [numels(layer.inventory.values()), numels(layer.router.parameters())]}
    assert sum(trained["pre-training"]) == numels(p for p in layer.parameters() if p.requires_grad)
    layer.router.add_tasks(1, keep=False)
    trained["all"] = [numels(layer.inventory.values()), numels(layer.router.parameters())]
    trained["z"] = [numels(layer.router.parameters())]
    trained["μ"] = [numels(layer.average_skills().values())]
    assert {name: terms for name, (_, terms) in PICTURE.counts().items()} == trained
    _, texts, _, _ = elements("variants.svg")
    shown = ["".join(text.itertext()) for text, _ in texts]
    for formula, terms in PICTURE.counts().values():
        assert eval(re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula), dict(PICTURE.SIZES)) == sum(terms)
        total = f" = {sum(terms)}" if len(terms) > 1 else ""
        assert formula in shown and " + ".join(map(str, terms)) + total in shown


# ------------------------------------------------------------------------------------------------------- the pages


class Reader(HTMLParser):
    """A page's tags, links, anchors, text, and the text of its code; an element that is not closed is an error."""

    EMPTY = {"meta", "img", "wbr", "link", "br"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.code, self.math = [], [], [], "", [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.text += " " if tag != "wbr" else ""
        self.open += [] if tag in self.EMPTY else [tag]
        self.code += [""] if tag == "pre" and "div" not in self.open else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if "pre" in self.open and "div" not in self.open:
            self.code[-1] += data
        elif "math" in self.open:
            self.math += data
        elif "style" not in self.open:
            self.text += data

    def all_of(self, key: str) -> list[str]:
        return [value for name, value in self.attributes if name == key]


def read(module: str) -> Reader:
    return Reader((ROOT / "docs" / "html" / f"{module}.html").read_text("utf-8"))


@needs_libraries
def test_the_pages_are_what_the_command_makes(tmp_path):
    done = command(copied(tmp_path), "annotate.py")
    assert done.returncode == 0 and done.stdout.count("wrote docs/html/") == len(PAGES), done.stderr
    for module in PAGES:
        made = (tmp_path / "docs" / "html" / f"{module}.html").read_bytes()
        assert made == (ROOT / "docs" / "html" / f"{module}.html").read_bytes(), "run: python docs/annotate.py"


@pytest.mark.parametrize("module", PAGES)
def test_a_page_has_all_code_of_its_file_and_all_prose(module):
    """Each line of the file is code on the page, in order, or its words are in the text; a formula counts as words."""
    page, source = read(module), (ROOT / f"{module}.py").read_text("utf-8")
    shown = iter([line.strip() for line in "\n".join(page.code).splitlines() if line.strip()])
    formulas = runpy.run_path(str(ROOT / "docs" / "formulas.py"))["FORMULAS"][module]
    prose, expected = "", next(shown, None)
    for line in source.splitlines():
        if line.strip() == expected:
            expected = next(shown, None)
        else:
            prose += f"{line.strip()}\n" if line.strip() else ""
    assert expected is None  # nothing else is shown as code
    for plain in formulas:
        prose = prose.replace(plain.strip(), " ")
    words = set(re.findall(r"\w\w+", prose))
    assert len(words) > 150
    assert not words - set(re.findall(r"\w\w+", page.text))


@pytest.mark.parametrize("module", PAGES)
def test_formulas_are_mathml_and_equations_have_their_place(module):
    page = read(module)
    tables = runpy.run_path(str(ROOT / "docs" / "formulas.py"))
    assert "$" not in page.text and not re.search(r"[\\$_]", page.math)
    assert page.tags.count("math") >= sum(text.count("$") // 2 for text in tables["FORMULAS"][module].values())
    assert not re.search(r"sum_|sqrt\(|\^T|\bw_|\^\w", page.text), "a formula that is not set"
    papers, shown = (ROOT / "docs" / "papers.md").read_text("utf-8"), "".join(page.text.split())
    for _, begins in tables["EQUATIONS"][module].values():
        (line,) = [line for line in papers.splitlines() if line.startswith(f"| {begins}")]
        place = re.sub("^Pol ", "Polytropon ", line.split("|")[1].strip()).replace("`", "")
        assert "".join(place.split()) in shown and re.search(r"::(\w+)", line)[1] in shown


@pytest.mark.parametrize("module", PAGES)
def test_an_equation_names_its_indices(module):
    """Below it stands what each index is, also a hidden one: the skills under a sum, the task above a letter."""
    tables = runpy.run_path(str(ROOT / "docs" / "formulas.py"))
    assert tables["NAMES"].keys() == {begins for of in tables["EQUATIONS"].values() for _, begins in of.values()}
    for latex, begins in tables["EQUATIONS"][module].values():
        indices = re.findall(r"\\tau|(?<![a-z])[ijk](?![a-z])", " ".join(re.findall(r"[_^](\{.*?\}|\\?\w+)", latex)))
        assert set(indices) <= set(re.findall(r"\\\w+|\w+", tables["NAMES"][begins])), begins


@pytest.mark.parametrize("module", PAGES)
def test_an_equation_with_a_and_b_says_what_they_are_here(module):
    """Above its frame, and as the table at the top of lora.py has it; an equation without them says nothing."""
    tables = runpy.run_path(str(ROOT / "docs" / "formulas.py"))
    table = (ROOT / "lora.py").read_text("utf-8").split("here: (x A) B")[1].split("\n\n")[0]
    (our_a, our_b) = (re.split(" {2,}", line.strip()) for line in table.splitlines()[1:])
    text = (ROOT / "docs" / "html" / f"{module}.html").read_text("utf-8")
    for name, (latex, begins) in tables["EQUATIONS"][module].items():
        paper, section = begins.split()[0], text.split(f'id="{name}"')[1].split("</section>")[0]
        has_letters = any(letter in re.sub(r"\\\w+", "", latex) for letter in "AB")
        says = re.findall(r'<p class="letters">(.*?)</p>\s*<figure>', section)
        assert len(says) == has_letters, name
        column = ("MHR", "Pol").index(paper) + 1
        there_a, there_b = our_a[column], our_b[column]  # what our A and our B are there: A^T there means our B^T is A
        assert there_b.startswith("A^T") and there_a in ("B", "B^T")
        ours = "A^\\top" if there_a == "B^T" else "A"
        assert tables["LETTERS"][paper].endswith(f"its $A$ is our $B^\\top$, its $B$ our ${ours}$.")


@pytest.mark.parametrize("module", PAGES)
def test_a_page_needs_nothing_from_elsewhere(module):
    """No script, style, font or picture from another place; links lead to files, anchors and papers that there are."""
    page, text = read(module), (ROOT / "docs" / "html" / f"{module}.html").read_text("utf-8")
    assert not {"script", "link", "iframe"} & set(page.tags) and not re.search(r"url\(|@import|\son\w+=", text)
    ids = page.all_of("id")
    assert len(ids) == len(set(ids))
    for target in (*page.all_of("href"), *page.all_of("src")):
        if target.startswith("#"):
            assert target[1:] in ids
        elif not re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}(v\d)?", target):
            assert (ROOT / "docs" / "html" / target).is_file(), target
    others = {f"{other}.html" for other in PAGES} | {
        f"../{other}.md" for other in ("papers", "walkthrough", "exercises")
    }
    assert {"../../README.md", f"../../{module}.py", *others} <= set(page.all_of("href"))
    assert all(page.all_of("alt")) and len(page.all_of("alt")) == page.tags.count("img")


def test_the_pages_can_be_read_in_light_and_dark():
    """Each colour of text against the page and against the ground of code."""
    style = (ROOT / "docs" / "page.html").read_text("utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", style, re.S)
    for scheme in (light, dark):
        colours = dict(re.findall(r"--(\w+): (#\w{6})", scheme))
        grounds = {"page", "code", "line"}
        assert len(colours) == 10
        for name in colours.keys() - grounds:
            assert min(contrast(colours[name], colours[ground]) for ground in ("page", "code")) >= 4.5, name


@needs_libraries
def test_a_formula_whose_text_is_gone_is_refused(tmp_path):
    """In one sentence, and nothing is written for that file; the same for a definition and a line of papers.md."""
    folder = copied(tmp_path)
    for name, old, new, says in (
        ("mhr.py", "w_kj  = z^_kj", "w_kj = z^_kj", "mhr.py no longer has \"w_kj  = z^_kj / sum_j' z^_kj'\""),
        ("mhr.py", "def average_skills", "def mean_skills", "mhr.py no longer has 'MHRLinear.average_skills'"),
        ("docs/papers.md", "| Pol eq. 2,", "| Pol equation 2,", "0 lines of papers.md begin with 'Pol eq. 2', not one"),
    ):
        text = (ROOT / name).read_text("utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new), "utf-8")
        done = command(folder, "annotate.py")
        assert (done.returncode, done.stderr) == (2, f"error: docs/formulas.py: {says}\n")
        assert not (folder / "docs" / "html" / "mhr.html").exists()
        (folder / name).write_text(text, "utf-8")


def test_without_the_libraries_one_sentence_names_them(tmp_path):
    (tmp_path / "pygments.py").write_text("raise ImportError")
    (tmp_path / "latex2mathml.py").write_text("raise ImportError")
    done = command(ROOT, "annotate.py", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == "error: docs/annotate.py needs two packages: pip install pygments latex2mathml\n"


# -------------------------------------------------------------------------------------------------- all Markdown pages

MARKDOWN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "results").glob("*.md"))]
IDS = [str(path.relative_to(ROOT)) for path in MARKDOWN]


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.M | re.S)


def images(path: Path) -> list[tuple[str, str]]:
    """(alternative text, file) of each image of a page."""
    text = prose(path)
    tags = [dict(re.findall(r'(\w+)="([^"]*)"', tag)) for tag in re.findall(r"<img\s.*?>", text, re.S)]
    found = [(tag["alt"], tag["src"]) for tag in tags] + re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", text)
    return [(" ".join(alt.split()), target) for alt, target in found]


def anchors(path: Path) -> set[str]:
    """What #... may lead to on a page: its headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)", prose(path), re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("path", MARKDOWN, ids=IDS)
def test_links_lead_to_files_and_headings(path):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", prose(path)):
        led = path.parent / target if target else path
        assert led.exists(), target
        assert not anchor or anchor in anchors(led), f"{target}#{anchor}"


OTHER_NAMES = {  # what is said in text, tables and figures, and what is not
    "held-out tasks": r"unseen tasks?|held[- ]out (examples|rows|compositions)",
    "μ, or `mu` for the flag": r"\bmu\b|\w-mu\b",
    "(IA)³": r"\(IA\)\^3",
    "LoRA (Shared), or one LoRA for all tasks": r"[Ss]hared LoRA|one shared adapter|LoRA, one for all|single LoRA",
}


@pytest.mark.parametrize("path", MARKDOWN, ids=IDS)
def test_each_thing_has_one_name(path):
    """In the text of the pages, without their code and what programs print; mu, mu-told, mu-scarce name claims too."""
    text = re.sub(r"^    .*|`[^`]*`|(?<=\])\([^)]*\)", "", prose(path), flags=re.M)
    if path.name == "claims.md":
        text = re.sub(r"#+ mu(-told|-scarce)?\b|\[mu(-told|-scarce)?\]|Claim mu(-told|-scarce)?\.", "", text)
    for name, others in OTHER_NAMES.items():
        assert not (found := re.search(others, text)), f"{found[0]!r}: say {name}"


@pytest.mark.parametrize("path", MARKDOWN, ids=IDS)
def test_images_say_what_they_show(path):
    """Each has a text of its own, which is no sentence of its page."""
    found, text = images(path), " ".join(re.sub(r"!\[[^\]]*\]|<img\s.*?>", "", prose(path), flags=re.S).split()).lower()
    assert len({alt for alt, _ in found}) == len(found)
    for alt, target in found:
        assert (path.parent / target).is_file() and len(alt) > 40 and alt.lower().strip(".") not in text, (target, alt)


def test_the_texts_of_the_claims_figures_say_what_is_drawn():
    """A claim's text names it, its kind of plot, its axes and bars, and has the mean of each measure that is compared;
    none is a sentence of the claim."""
    from experiments import claim_figures, reproduce, verdicts

    assert claim_figures.ALTS.keys() == claim_figures.FIGURES.keys()
    raw = verdicts.read_raw(ROOT / "results" / "claims.jsonl")
    shown = {target: alt for alt, target in images(ROOT / "results" / "claims.md")}
    for name in reproduce.claims_on_page(raw, verdicts.SEEDS, []):
        claim, alt = verdicts.CLAIMS[name], shown[f"claim-{name}.png"]
        assert alt.startswith(f"Claim {name}. ") and re.search(r"\b(plot|curves)\b", alt) and "bars" in alt
        assert not set(re.split(r"(?<=\.) ", alt)) & set(re.split(r"(?<=\.) ", claim.says))
        of = verdicts.collect(raw, reproduce.measures_of(claim), verdicts.SEEDS)
        named = re.search(r" (Means|Highest and lowest mean): (.*)\.$", alt)
        means = dict(text.rsplit(" ", 1) for text in named[2].split("; "))
        all_of = {claim_figures.shown(m): str(v).split()[0] for m, v in of.items()}
        assert len(means) >= 2 and means.items() <= all_of.items()


@pytest.mark.parametrize(
    "path", [path for path in MARKDOWN if path.parent.name == "results"], ids=lambda path: path.name
)
def test_pages_of_results_lead_back(path):
    first, second, third = path.read_text("utf-8").splitlines()[:3]
    assert first.startswith("[README](../README.md) · ") and not second and third.startswith("# ")
    assert path.name == "README.md" or "[results](README.md)" in first


def test_pages_of_results_lead_back_when_they_are_made_again(tmp_path, monkeypatch):
    """Those that a command writes: in results/, where the links are right; a page elsewhere has no such line."""
    from experiments import gpu, larger, methods, mixing, reproduce

    assert larger.TEXT.startswith("{navigation}#") and mixing.TEXT.startswith("{navigation}#")
    for module in (gpu, reproduce):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    for folder in ("results", "elsewhere"):
        (tmp_path / folder).mkdir()
        gpu.save({"command": "x", "device": "cpu", "seconds": 0.0, "items": {}}, tmp_path / folder)
        reproduce.write_page(tmp_path / folder, (0, 1, 2), ["mu"])
        for name in ("gpu.md", "claims.md"):
            text = (tmp_path / folder / name).read_text("utf-8")
            assert text.startswith(methods.NAVIGATION) == (folder == "results") and "\n# " in f"\n{text}"


def test_code_in_the_map_of_the_papers_is_a_link_to_its_file():
    """In the second column of docs/papers.md; a claim's page is led to at the claim that the command makes."""
    rows = [
        row.split(" | ") for row in (ROOT / "docs" / "papers.md").read_text("utf-8").splitlines() if row[:2] == "| "
    ]
    links = 0
    for _, ours, *_, last in rows:
        named = re.findall(r"`((?:\w+[./])+\w+)`", ours)
        found = re.findall(r"\[`([\w./]+)`\]\(([\w./]+)#?([\w-]*)\)", ours)
        assert named == [name for name, _, _ in found]
        links += len(found)
        for name, target, anchor in found:
            place = (ROOT / "docs" / target).resolve().relative_to(ROOT)
            dotted = ".".join(place.with_suffix("").parts)
            assert str(place) == name or name.startswith(f"{dotted}."), name
            claim = re.search(r"--claim ([\w-]+)", last)
            assert anchor == (claim[1] if claim and place.name == "claims.md" else ""), name
    assert links > 60
