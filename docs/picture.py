"""Draw docs/mhr.svg, what MHR computes for one task in one linear layer, and docs/variants.svg, what variants train.

    python docs/picture.py

Colour is a skill, position is a head. Each picture stands on a card of its own, light or dark as the reader's screen
asks, so that its text can be read on any page. Sizes and numbers are those of one small example.
"""

import math
import re
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
WIDTH = 800
SIZES = dict(b=1, l=3, i=6, o=4, r=2, t=4, s=3, h=2)  # the letters of the shape key in mhr.py
LOGITS = [[1.2, -1.5, 0.3], [-0.8, 1.6, 0.4]]  # the row of Z of one task: heads x skills
NOISE = [[0.4, -0.3, -0.5], [-0.2, 0.5, 0.6]]  # logit(u) of one draw
TASK = 2  # which row of Z that is, counted from 0
INK = {  # a class of elements: its colour on the light card, and on the dark one
    "card": ("#f6f8fa", "#161b22"),
    "text": ("#1f2328", "#e6edf3"),
    "soft": ("#59636e", "#9aa4af"),
    "line": ("#818b98", "#768390"),
    "skill1": ("#3f83cc", "#4184c9"),
    "skill2": ("#c8800f", "#c98727"),
    "skill3": ("#2f9472", "#2f9472"),
}
ALT = {
    "mhr.svg": "Multi-Head Routing for one task in one linear layer, in three steps. Route: the task's row of Z, 2 "
    "heads by 3 skills, gets logit(u) of noise u and a sigmoid and is divided by its sum over the skills in each "
    "head, which gives the weights w. Mix: A and B of each of the 3 skills are cut into 2 blocks, one for each head; "
    "each block is averaged over the skills with its head's weights, and the blocks are concatenated to one A and one "
    "B. With one head, Poly, one set of weights mixes A and B whole. Apply: x goes through the frozen W0, and through "
    "A, then B, times alpha / r; the sum is y.",
    "variants.svg": "What is trained (filled) and what is frozen (outlined) in one linear layer. The backbone W0 is "
    "frozen throughout. Pre-training trains the skills, s r (i + o) parameters, and Z, t h s. For a new task, the "
    "variant all trains the skills and one row of Z, h s; the variant z that row only; the variant mu trains one "
    "adapter, the average of the skills, r (i + o), and has no Z.",
}


def weights() -> tuple[list[list[float]], list[list[float]]]:
    """z^ (h, s), how much each skill is on, and w (h, s), z^ divided by its sum over the skills of a head."""
    pairs = [zip(*rows, strict=True) for rows in zip(LOGITS, NOISE, strict=True)]
    on = [[1 / (1 + math.exp(-z - noise)) for z, noise in row] for row in pairs]
    return on, [[value / sum(row) for value in row] for row in on]


class Drawing:
    """The elements of an SVG in the order in which they are drawn. Lengths are pixels at a width of 800.

    A kind is a list of classes: one of INK fills, one of INK with "-edge" draws the outline.
    """

    def __init__(self, name: str, title: str, height: int):
        light, dark = (
            "".join(f".{kind}{{fill:{ink[k]}}}.{kind}-edge{{stroke:{ink[k]}}}" for kind, ink in INK.items())
            for k in (0, 1)
        )
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" role="img" aria-labelledby="title desc">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="desc">{escape(ALT[name])}</desc>',
            "<style>text{font-family:Helvetica,Arial,'DejaVu Sans',sans-serif}"
            ".math{font-family:'STIX Two Text','Times New Roman','DejaVu Serif',serif;font-style:italic}"
            f"{light}@media(prefers-color-scheme:dark){{{dark}}}</style>",
        ]
        self.rect(0.5, 0.5, WIDTH - 1, height - 1, "card line-edge", radius=10)

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])

    def rect(self, x, y, width, height, kind, radius=0, opacity=1, dashed=False):
        box = f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
        more = f' rx="{radius}"' if radius else ""
        more += f' opacity="{opacity}"' if opacity != 1 else ""
        more += ' stroke-dasharray="4 3"' if dashed else ""
        more += "" if set(kind.split()) & INK.keys() else ' fill="none"'
        self.parts.append(f'<rect {box} class="{kind}" stroke-width="1.5"{more}/>')

    def text(self, x, y, text, size=13, anchor="start", kind="text", bold=False):
        """text: letters between stars are set in italics, with an index after _ : "*A_1* of"."""
        weight = ' font-weight="bold"' if bold else ""
        place = f'x="{number(x)}" y="{number(y)}" font-size="{size}" text-anchor="{anchor}"'
        self.parts.append(f'<text {place}{weight} class="{kind}">{spans(text, size)}</text>')

    def shape(self, x, y, text, anchor="middle"):
        """A shape, on an arrow or beside a matrix."""
        self.text(x, y, text, 11, anchor, "soft")

    def line(self, *points):
        self.parts.append(f'<path d="{path(points)}" fill="none" stroke-width="1.5" class="line-edge"/>')

    def arrow(self, *points):
        """A line through the points that ends, level or upright, in a head."""
        (x0, y0), (x, y) = points[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        head = [(x, y), (x - 7 * dx + 4 * dy, y - 7 * dy + 4 * dx), (x - 7 * dx - 4 * dy, y - 7 * dy - 4 * dx)]
        self.line(*points[:-1], (x - 5 * dx, y - 5 * dy))
        self.parts.append(f'<path d="{path(head)}Z" class="line"/>')

    def matrix(self, x, y, rows, columns, cell, fills=()):
        """A grid of cells. fills: (kind, x, y, width, height) of what is coloured, as parts of the matrix."""
        across, down = columns * cell, rows * cell
        for kind, left, top, width, height in fills:
            self.rect(x + left * across, y + top * down, width * across, height * down, kind)
        grid = [((x + k * cell, y), (x + k * cell, y + down)) for k in range(1, columns)]
        grid += [((x, y + k * cell), (x + across, y + k * cell)) for k in range(1, rows)]
        edge = "card-edge" if fills else "line-edge"
        self.parts.append(f'<path d="{"".join(map(path, grid))}" fill="none" opacity="0.45" class="{edge}"/>')
        self.rect(x, y, across, down, "line-edge")


def number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def path(points) -> str:
    return "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)


def spans(text: str, size: float) -> str:
    """The text as SVG: of "*A_1* of", A in italics, 1 as its index, and of."""
    found, low = [], 0
    for k, part in enumerate(text.split("*")):
        for j, piece in enumerate(re.split(r"_(\w+)", part) if k % 2 else [part]):
            if not piece:
                continue
            to = 0.25 * size if j % 2 else 0
            style = ' class="math"' if k % 2 and not piece.isdigit() else ""
            style += f' font-size="{number(0.75 * size)}"' if to else ""
            style += f' dy="{number(to - low)}"' if to != low else ""
            found.append(f"<tspan{style}>{escape(piece)}</tspan>" if style else escape(piece))
            low = to
    return "".join(found)


def skill(k: int) -> list[tuple]:
    """The fill of a matrix that belongs to one skill, counted from 0."""
    return [(f"skill{k + 1}", 0, 0, 1, 1)]


def mixture(w, across: bool) -> list[tuple]:
    """The fills of a mixed matrix: each head's block, and in it each skill's colour as wide as its weight.

    w (h, s). across: skills side by side and blocks one above the other, as in A; else the other way, as in B.
    """
    fills = []
    for head, row in enumerate(w):
        for k, weight in enumerate(row):
            place = (sum(row[:k]), head / len(w)), (weight, 1 / len(w))
            (x, y), (width, height) = place if across else (pair[::-1] for pair in place)
            fills.append((f"skill{k + 1}", x, y, width, height))
    return fills


def heading(draw: Drawing, y, title: str, remark: str):
    draw.text(24, y, title, 15, bold=True)
    draw.text(86, y, remark, kind="soft")


def table(draw: Drawing, x, y, rows, title: str, digits=2):
    """Numbers (h, s) in their skills' colours; those with 2 digits are parts of 1, and fill that part of their cell."""
    parts = digits == 2
    draw.text(x + 60, y - 10, title, anchor="middle")
    for head, row in enumerate(rows):
        for k, value in enumerate(row):
            left, top = x + 40 * k, y + 26 * head
            draw.rect(left, top, 40 * value if parts else 40, 22, f"skill{k + 1}", opacity=0.4 if parts else 0.15)
            draw.rect(left, top, 40, 22, f"skill{k + 1}-edge")
            draw.text(left + 20, top + 15.5, f"{value:.{digits}f}".replace("-", "−"), 12, "middle")


def route(draw: Drawing):
    """Step 1: from Z to the weights."""
    on, w = weights()
    remark = "the task's row of *Z* becomes weights that sum to 1 in each head; noise *u* in training only"
    heading(draw, 34, "Route", remark)
    draw.text(69, 66, "*Z* (t, h, s)", anchor="middle")
    for task in range(SIZES["t"]):
        for head in range(SIZES["h"]):
            for k in range(SIZES["s"]):
                left, top = 24 + 48 * head + 14 * k, 76 + 17 * task
                draw.rect(left, top, 14, 14, f"skill{k + 1} card-edge", opacity=1 if task == TASK else 0.35)
    y = 76 + 17 * TASK + 7
    draw.rect(21.5, y - 9.5, 95, 19, "text-edge", radius=3)
    for head in range(SIZES["h"]):
        draw.shape(45 + 48 * head, 158, f"head {head + 1}")
        draw.shape(202, y - 9 + 26 * head, f"head {head + 1}", "end")
    for x, end, label in ((121, 160, "row"), (334, 432, "+ logit *u*, then σ"), (564, 652, "÷ sum over s")):
        draw.arrow((x, y), (end, y))
        draw.text((x + end) / 2, y - 8, label, 12, "middle")
        draw.shape((x + end) / 2, y + 17, "(h, s)")
    table(draw, 208, y - 24, LOGITS, "*z*, logits", digits=1)
    table(draw, 438, y - 24, on, "*ẑ*, how far on")
    table(draw, 656, y - 24, w, "*w*, weights")


def weighted(draw: Drawing, x, y, k: int, weight: float):
    """The weight of skill k, ending at x."""
    draw.text(x, y, f"{'+ ' if k else ''}{weight:.2f} ×", 12, "end")


def mix_a(draw: Drawing, w, x, y, cell=16):
    """Step 2 for A: skills side by side, heads one above the other, because A is cut along its inputs."""
    d, r = SIZES["i"] // SIZES["h"], SIZES["r"]
    middles = [y + d * cell / 2 + (d * cell + 14) * head for head in range(SIZES["h"])]
    draw.shape(x, y - 8, "(s, i, r)", "start")
    for k in range(SIZES["s"]):
        draw.text(x + 110 + 101 * k, y - 8, f"*A_{k + 1}*", anchor="middle")
    for head, (row, middle) in enumerate(zip(w, middles, strict=True)):
        draw.shape(x, middle + 4, f"head {head + 1}", "start")
        for k, weight in enumerate(row):
            weighted(draw, x + 89 + 101 * k, middle + 4, k, weight)
            draw.matrix(x + 94 + 101 * k, middle - d * cell / 2, d, r, cell, skill(k))
        draw.text(x + 334, middle + 4, "=")
        draw.matrix(x + 350, middle - d * cell / 2, d, r, cell, mixture([row], True))
    draw.shape(x + 366, y - 8, "(d, r)")
    middle = sum(middles) / 2
    draw.line((x + 386, middles[0]), (x + 394, middles[0]), (x + 394, middles[1]), (x + 386, middles[1]))
    draw.arrow((x + 394, middle), (x + 446, middle))
    draw.text(x + 418, middle - 8, "concat", 11, "middle")
    draw.matrix(x + 450, middle - d * cell, 2 * d, r, cell, mixture(w, True))
    draw.text(x + 466, y - 8, "*A* (i, r)", anchor="middle")


def mix_b(draw: Drawing, w, x, y, cell=16):
    """Step 2 for B: heads side by side, skills one above the other, because B is cut along its outputs."""
    e, r = SIZES["o"] // SIZES["h"], SIZES["r"]
    draw.shape(x, y - 8, "(s, r, o)", "start")
    for k in range(SIZES["s"]):
        draw.text(x, y + 20 + 42 * k, f"*B_{k + 1}*")
    lefts = [x + 88 + 104 * head for head in range(SIZES["h"])]
    for head, (row, left) in enumerate(zip(w, lefts, strict=True)):
        draw.shape(left + e * cell / 2, y - 8, f"head {head + 1}")
        for k, weight in enumerate(row):
            weighted(draw, left - 5, y + 20 + 42 * k, k, weight)
            draw.matrix(left, y + 42 * k, r, e, cell, skill(k))
        draw.text(left - 5, y + 154, "=", anchor="end")
        draw.matrix(left, y + 134, r, e, cell, mixture([row], False))
    draw.shape(x, y + 154, "(r, e)", "start")
    middle, top = sum(lefts) / 2 + e * cell / 2, y + 170
    draw.line(*((left + e * cell / 2, top + step) for left, step in zip(sorted(lefts * 2), (0, 8, 8, 0), strict=True)))
    draw.arrow((middle, top + 8), (middle, top + 30))
    draw.text(middle + 9, top + 24, "concat", 11)
    draw.matrix(middle - e * cell, top + 34, r, 2 * e, cell, mixture(w, False))
    draw.text(middle - e * cell - 8, top + 54, "*B* (r, o)", anchor="end")


def one_head(draw: Drawing, row, x, y, cell=9):
    """The inset: Poly."""
    draw.rect(x, y, 482, 84, "line-edge", radius=6, dashed=True)
    draw.text(x + 12, y + 26, "One head is Poly", bold=True)
    for k, line in enumerate(("With h = 1 one set of", "weights mixes *A* whole,", "and *B* whole.")):
        draw.text(x + 12, y + 44 + 15 * k, line, 12)
    for k, weight in enumerate(row):
        weighted(draw, x + 222 + 86 * k, y + 46, k, weight)
        draw.matrix(x + 226 + 86 * k, y + 15, SIZES["i"], SIZES["r"], cell, skill(k))
    draw.text(x + 424, y + 46, "=")
    draw.matrix(x + 446, y + 15, SIZES["i"], SIZES["r"], cell, mixture([row], True))


def adapted(draw: Drawing, w, up, cell=12):
    """Step 3: x through the frozen layer, its middle at height `up`, and through A and B, 112 below."""
    i, o, r, length = (SIZES[letter] for letter in "iorl")
    down, middle = up + 112, up + 56
    draw.text(60, middle - 26, "*x* (b, l, i)", anchor="middle")
    draw.matrix(24, middle - 18, length, i, cell)
    draw.line((100, middle), (124, middle))
    draw.arrow((124, middle), (124, up), (210, up))
    draw.arrow((124, middle), (124, down), (210, down))
    draw.text(238, up - 46, "*W_0* transposed (i, o), frozen", anchor="middle")
    draw.matrix(214, up - 36, i, o, cell)
    draw.text(226, down - 46, "*A*", anchor="middle")
    draw.matrix(214, down - 36, i, r, cell, mixture(w, True))
    draw.arrow((242, down), (330, down))
    draw.text(358, down - 22, "*B*", anchor="middle")
    draw.matrix(334, down - 12, r, o, cell, mixture(w, False))
    draw.arrow((386, down), (470, down))
    draw.rect(474, down - 15, 66, 30, "line-edge", radius=6)
    draw.text(507, down + 4.5, "× 1 / r", anchor="middle")
    draw.arrow((544, down), (624, down), (624, middle + 14))
    draw.arrow((266, up), (624, up), (624, middle - 14))
    draw.rect(612, middle - 12, 24, 24, "line-edge", radius=12)
    draw.line((618, middle), (630, middle))
    draw.line((624, middle - 6), (624, middle + 6))
    draw.arrow((640, middle), (724, middle))
    draw.matrix(728, middle - 18, length, o, cell)
    draw.text(752, middle - 26, "*y*", anchor="middle")
    for x, y, shape in ((167, up, "i"), (167, down, "i"), (286, down, "r"), (428, down, "o"), (584, down, "o"),
                        (445, up, "o"), (682, middle, "o")):  # fmt: skip
        draw.shape(x, y - 8, f"(b, l, {shape})")


def key(draw: Drawing, y):
    """What colours mean, and the sizes of the example."""
    for k in range(SIZES["s"]):
        draw.rect(24 + 78 * k, y - 10, 12, 12, f"skill{k + 1}")
        draw.text(42 + 78 * k, y, f"skill {k + 1}", 12)
    draw.text(260, y, "In a mixed block, a colour's share is its skill's weight.", 12, kind="soft")
    draw.text(24, y + 20, f"{sizes('blio')}, rank {sizes('r')}", 12, kind="soft")
    d, e = SIZES["i"] // SIZES["h"], SIZES["o"] // SIZES["h"]
    draw.text(24, y + 38, f"{sizes('tsh')}; d = i / h = {d}, e = o / h = {e}", 12, kind="soft")


def sizes(letters: str) -> str:
    """The sizes of the example in words."""
    words = dict(b="example", l="tokens", i="inputs", o="outputs", r="", t="tasks", s="skills", h="heads")
    return ", ".join(f"{letter} = {SIZES[letter]} {words[letter]}".strip() for letter in letters)


def mhr() -> str:
    _, w = weights()
    draw = Drawing("mhr.svg", "Multi-Head Routing for one task in one linear layer", 820)
    route(draw)
    remark = "each block of *A* and *B* is the sum of weight × block over the skills; then blocks are concatenated"
    heading(draw, 194, "Mix", remark)
    mix_a(draw, w, 24, 238)
    mix_b(draw, w, 548, 238)
    one_head(draw, w[0], 24, 386)
    heading(draw, 512, "Apply", "*y* is what the frozen layer gives, plus the update by the task's own *A* and *B*")
    adapted(draw, w, 584)
    key(draw, 764)
    return draw.svg()


def counts() -> dict[str, tuple[str, list[int]]]:
    """For each column of docs/variants.svg: the number of trained parameters as a formula, and its terms here."""
    t, s, h, r, i, o = (SIZES[letter] for letter in "tshrio")
    return {
        "pre-training": ("s r (i + o) + t h s", [s * r * (i + o), t * h * s]),
        "all": ("s r (i + o) + h s", [s * r * (i + o), h * s]),
        "z": ("h s", [h * s]),
        "μ": ("r (i + o)", [r * (i + o)]),
    }


def part(draw: Drawing, x, y, width, height, kind: str, trained: bool):
    """Something that is filled if it is trained and outlined if it is frozen."""
    draw.rect(x, y, width, height, f"{kind} {kind}-edge" if trained else f"{kind}-edge")


def column(draw: Drawing, x, name: str):
    """One column of docs/variants.svg, 150 wide: backbone, skills or their average, Z, and the count."""
    formula, terms = counts()[name]
    first = name == "pre-training"
    draw.text(x, 34, "Pre-training" if first else f"New task: {name}", 15, bold=True)
    draw.text(x, 53, "train.py" if first else f"adapt.py --variant {name.replace('μ', 'mu')}", 12, kind="soft")
    part(draw, x, 74, 26, 39, "line", False)
    if name == "μ":
        for kind, left, top, width, height in mixture([[1 / SIZES["s"]] * SIZES["s"]], True):
            part(draw, x + 13 * left, 138 + 39 * top, 13 * width, 39 * height, kind, True)
        for kind, left, top, width, height in mixture([[1 / SIZES["s"]] * SIZES["s"]], False):
            part(draw, x + 18 + 26 * left, 138 + 13 * top, 26 * width, 13 * height, kind, True)
        draw.text(x + 54, 160, "the average", 12, kind="soft")
        draw.text(x, 216, "none", 12, kind="soft")
    else:
        for k in range(SIZES["s"]):
            part(draw, x + 51 * k, 138, 13, 39, f"skill{k + 1}", name != "z")
            part(draw, x + 51 * k + 18, 138, 26, 13, f"skill{k + 1}", name != "z")
        for row in range(SIZES["t"] if first else 1):
            for head in range(SIZES["h"]):
                for k in range(SIZES["s"]):
                    part(draw, x + 51 * head + 15 * k, 204 + 16 * row, 11, 11, f"skill{k + 1}", True)
        draw.text(x + 102, 214, "all tasks" if first else "one row", 12, kind="soft")
    draw.text(x, 300, formula, bold=True)
    draw.text(x, 320, " + ".join(map(str, terms)) + (f" = {sum(terms)}" if len(terms) > 1 else ""), kind="soft")


def variants() -> str:
    draw = Drawing("variants.svg", "What is trained and what is frozen, in pre-training and for a new task", 384)
    for y, label, more in ((88, "backbone", "*W_0*"), (152, "skills", "*A* and *B*"), (214, "routing", "*Z*"),
                           (300, "parameters", "that are trained")):  # fmt: skip
        draw.text(24, y, label)
        draw.text(24, y + 17, more, 12, kind="soft")
    for k, name in enumerate(counts()):
        column(draw, 134 + 168 * k, name)
    draw.rect(24, 352, 12, 12, "soft soft-edge")
    draw.text(44, 362.5, "trained", 12)
    draw.rect(112, 352, 12, 12, "soft-edge")
    draw.text(132, 362.5, "frozen", 12)
    draw.text(196, 362.5, f"one layer: {sizes('io')}, rank {sizes('r')}, {sizes('tsh')} (Poly: 1)", 12, kind="soft")
    return draw.svg()


def pictures() -> dict[str, str]:
    """{file name: its text}."""
    return {"mhr.svg": mhr(), "variants.svg": variants()}


def main():
    for name, picture in pictures().items():
        (HERE / name).write_text(picture, encoding="utf-8", newline="\n")
        print(f"wrote docs/{name}")


if __name__ == "__main__":
    main()
