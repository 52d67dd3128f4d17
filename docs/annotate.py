"""Make docs/html/lora.html, poly.html and mhr.html: each concept file's prose on the left, its code on the right.

    pip install pygments latex2mathml && python docs/annotate.py

All text is the file's own: docstrings, and comments on lines of their own. Formulas in it, and the papers' equations
beside the definitions that compute them, come from formulas.py and are set as MathML; papers.md says where an equation
stands and which test holds it. A formula whose text, definition or line is no longer there is an error.
"""

import ast
import re
import sys
import textwrap
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template

from formulas import EQUATIONS, FORMULAS, LETTERS, NAMES

try:
    from latex2mathml.converter import convert
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer
except ImportError:
    print("error: docs/annotate.py needs two packages: pip install pygments latex2mathml", file=sys.stderr)
    sys.exit(2)

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[1]
PAGES = tuple(EQUATIONS)
GAP = r"(?<![.;,\s]) {2,}"  # between two columns of a docstring


def refuse(what: str):
    print(f"error: docs/formulas.py: {what}", file=sys.stderr)
    sys.exit(2)


def sections(source: str) -> list[tuple[str, str, str]]:
    """(definition or "", prose, code) from the top: cut at each docstring, and at each comment on a line of its own."""
    lines, prose, hidden, names = source.splitlines(), {}, set(), {}  # prose, names: by a section's first line

    def visit(node, name):
        if text := ast.get_docstring(node):
            start = min(part.lineno for part in (node, *node.decorator_list)) if name else 1
            names[start], prose[start] = name, text
            hidden.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        for child in node.body:
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                visit(child, f"{name}.{child.name}".strip("."))

    visit(ast.parse(source), "")
    start = 0
    for k, line in enumerate(lines, 1):
        if k not in hidden and line.lstrip().startswith("#"):
            start = start if k - 1 in hidden and start in prose else k
            names.setdefault(start, "")
            prose[start] = f"{prose.get(start, '')} {re.sub('-{3,}', '', line).strip(' #')}".strip()
            hidden.add(k)
    starts = sorted(names)
    ends = (*starts[1:], len(lines) + 1)
    code = ["\n".join(lines[k - 1] for k in range(a, b) if k not in hidden) for a, b in zip(starts, ends, strict=True)]
    return [(names[k], prose.get(k, ""), textwrap.dedent(c).strip("\n")) for k, c in zip(starts, code, strict=True)]


def inline(text: str, links: dict[str, str]) -> str:
    """Text as HTML: `code`, $formulas$, [1] and addresses. links: where code and [1] lead."""
    found = []
    for piece in re.split(r"(`[^`]+`|\$[^$]+\$[.,;:]?|\[\d\]|https?://[^\s)]+)", re.sub(r"\s+", " ", text)):
        if piece[:1] == "$":
            formula, after = piece[1:].split("$")
            found.append(f'<span class="math">{convert(formula)}{after}</span>')
            continue
        bare = piece.strip("`")
        shown = f"<code>{escape(bare)}</code>" if piece[:1] == "`" else escape(piece).replace("+-", "±")
        target = piece if piece.startswith("http") else links.get(bare)
        found.append(f'<a href="{target}">{shown}</a>' if target else shown)
    return "".join(found)


def blocks(text: str, links: dict[str, str]) -> list[str]:
    """A docstring as HTML: paragraphs, points, columns, and code where an indented paragraph is Python."""
    found = []
    for part in text.split("\n\n"):
        if part.startswith("    "):
            part = textwrap.dedent(part)
            try:
                ast.parse(part)
            except SyntaxError:
                pass
            else:
                found.append(code(part))
                continue
        items = []  # (tag, cells)
        for line in part.split("\n"):
            cells = re.split(GAP, line.strip())
            if line.startswith("* "):
                items.append(("li", [": ".join(cells)[2:]]))
            elif len(cells) > 1:
                items.append(("tr", cells))
            elif items and (line.startswith(" ") or items[-1][0] == "p"):
                items[-1][1][-1] += f" {line.strip()}"
            else:
                items.append(("p", [line]))
        for tag, run in groupby(items, key=lambda item: item[0]):
            rows = [[inline(cell, links) for cell in cells] for _, cells in run]
            if tag == "tr":
                grid = ' class="grid"' * (len({len(row) for row in rows}) == 1 and len(rows) > 1)
                inner = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows)
                found.append(f"<table{grid}>{inner}</table>")
                continue
            inner = "".join(f"<{tag}>{row[0]}</{tag}>" for row in rows)
            found.append(f"<ul>{inner}</ul>" if tag == "li" else inner)
    return found


def code(text: str) -> str:
    return f"<pre>{highlight(text, PythonLexer(), HtmlFormatter(nowrap=True)).rstrip()}</pre>" if text else ""


def equation(latex: str, begins: str, links: dict[str, str]) -> str:
    """An equation, cut into lines at each double backslash, with the line of papers.md that begins so.

    Above it stands which of its letters are others in the code, if it has A or B; below it, what the rest are.
    """
    lines = (ROOT / "docs" / "papers.md").read_text("utf-8").splitlines()
    rows = [line for line in lines if line.startswith(f"| {begins}")]
    if len(rows) != 1:
        refuse(f"{len(rows)} lines of papers.md begin with '{begins}', not one")
    place, _, test = (cell.strip() for cell in rows[0].strip("|").split("|"))
    file, name = re.findall(r"`(\w+\.py)::(\w+)`", test)[0]
    says = f"{inline(re.sub('^Pol ', 'Polytropon ', place), {})}. Test: "
    link = f'<a href="../../tests/{file}"><code>{name}</code></a>'
    lines = "".join(convert(line, display="block") for line in latex.split(r"\\"))
    swapped = re.search(r"(?<![\\A-Za-z])[AB](?![A-Za-z])", latex)
    letters = f'<p class="letters">{inline(LETTERS[begins.split()[0]], {})}</p>' if swapped else ""
    names = inline(NAMES[begins], {})
    return f"{letters}<figure>{lines}<figcaption>{names}<br>{says}{link}</figcaption></figure>"


def page(module: str) -> str:
    """The page of a concept file."""
    source = (ROOT / f"{module}.py").read_text("utf-8")
    parts = sections(source)
    gone = EQUATIONS[module].keys() - {name for name, _, _ in parts}
    gone |= {text for text in FORMULAS[module] if not any(text in prose for _, prose, _ in parts)}
    if gone:
        refuse(f"{module}.py no longer has {sorted(gone)[0]!r}")
    links = {name: f"#{name}" for name, _, _ in parts if name} | dict(re.findall(r"(\[\d\]) (http\S+)", source))
    links |= {path.name: f"../../{path.name}" for end in ("py", "md") for path in ROOT.glob(f"*.{end}")}
    links |= {f"{m}.py": f"{m}.html" for m in PAGES}
    body = []
    for k, (name, prose, text) in enumerate(parts):
        for plain, formula in FORMULAS[module].items():
            prose = prose.replace(plain, formula)
        shown = blocks(prose, links)
        shown[1:1] = [equation(*EQUATIONS[module][name], links)] if name in EQUATIONS[module] else []
        if k == 0:
            shown[0] = shown[0].replace("p>", "h1>")
            shown += [picture()] if module == "mhr" else []
        elif name:
            shown.insert(0, f'<h2 id="{name}">{name.replace(".", ".<wbr>")}</h2>')
        kind = "" if k else ' class="intro"'
        body.append(f"<section{kind}>\n<div>{''.join(shown)}</div>\n{code(text)}\n</section>")
    nav = "".join(f'<a href="{m}.html"{" aria-current=page" * (m == module)}>{m}</a>' for m in PAGES)
    return Template((HERE / "page.html").read_text("utf-8")).substitute(module=module, nav=nav, body="\n".join(body))


def picture() -> str:
    """docs/mhr.svg, with its own description."""
    alt = re.search("<desc[^>]*>(.*)</desc>", (HERE / "mhr.svg").read_text("utf-8"))[1]
    return f'<figure class="picture"><img src="../mhr.svg" width="800" alt="{alt}"></figure>'


def main():
    (HERE / "html").mkdir(exist_ok=True)
    for module in PAGES:
        (HERE / "html" / f"{module}.html").write_text(page(module), encoding="utf-8", newline="\n")
        print(f"wrote docs/html/{module}.html")


if __name__ == "__main__":
    main()
