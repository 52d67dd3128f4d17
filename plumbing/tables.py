r"""Tables and texts for the terminal, and tables for pages, papers and spreadsheets.

A table is a list of lines of cells, the header first. Widths count columns of a terminal: a Chinese character has two.
"""

import csv
import io
import re
import statistics
import unicodedata
from itertools import zip_longest

# --- Texts ------------------------------------------------------------------------------------------------------------


def visible(text: str) -> str:
    r"""A text that cannot change the terminal: line breaks, control and invisible characters become \n, \x1b, ..."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def columns(text: str) -> int:
    """How many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    wide = {"W": 2, "F": 2}
    return sum(0 if unicodedata.combining(c) else wide.get(unicodedata.east_asian_width(c), 1) for c in text)


def wrapped(text: str, width: int) -> list[str]:
    """The lines of a text, at most `width` columns each. They break after a space; a longer word after one of =_/,.+-,
    or anywhere."""
    lines, used = [""], 0
    for word in re.findall(r"[^ ]+ *|^ +", text):
        long = columns(word.rstrip(" ")) > width
        for part in re.findall(r"[^=_/,.+-]*[=_/,.+-] *|.+", word) if long else [word]:
            if used and used + columns(part.rstrip(" ")) > width:
                lines, used = [*lines, ""], 0
            for c in part:
                if used + columns(c) > width and c != " ":
                    lines, used = [*lines, ""], 0
                lines[-1] += c
                used += columns(c)
    return [line.rstrip(" ") for line in lines]


def counted(number: int, word: str) -> str:
    """ "1 task", "2 tasks"."""
    return f"{number:,} {word}{'s' * (number != 1)}"


def in_words(counts: dict[str, int]) -> str:
    """{"adapters": 1234, "routing": 5} to "adapters 1,234, routing 5"."""
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def shortened(text: str, width: int) -> str:
    """A text in one line of at most `width` columns, its middle left out if need be."""
    line = visible(text)
    if columns(line) <= width:
        return line
    head = _first(line, (width - 1) * 2 // 3)
    return f"{head}…{_first(line[::-1], width - 1 - columns(head))[::-1]}"


def _first(text: str, width: int) -> str:
    """The beginning of a text in at most `width` columns."""
    count, used = 0, 0
    while count < len(text) and used + columns(text[count]) <= width:
        used, count = used + columns(text[count]), count + 1
    return text[:count]


def mean_std_text(values: list[float], sign: str = "+-", digits: int = 1) -> str:
    """ "mean +- standard deviation" with so many decimals; the mean alone for one value, "" for none."""
    if not values:
        return ""
    spread = f" {sign} {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


# --- Tables for the terminal ------------------------------------------------------------------------------------------


def aligned(lines: list[tuple[str, ...]], left: int = 2) -> str:
    """Rows of cells to text: the first `left` columns flush left, the others flush right."""
    widths = [max(columns(line[k]) for line in lines) for k in range(len(lines[0]))]
    cells = [
        [c + " " * (w - columns(c)) if k < left else " " * (w - columns(c)) + c for k, (c, w) in enumerate(pairs)]
        for pairs in (zip(line, widths, strict=True) for line in lines)
    ]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def fitted(lines: list[tuple[str, ...]], left: int, width: int = 100, first: int = 24) -> str:
    """`aligned` in `width` columns: whatever is in the first column and in the headings wraps, other cells stay whole.

    first: columns that the first column gets, if it needs them. Columns for which there is no room then follow in a
    table below, beside the first `left` ones again.
    """
    lines = [tuple(map(visible, line)) for line in lines]
    sizes = [[columns(cell) for cell in column] for column in zip(*lines, strict=True)]
    natural, needed = [max(size) for size in sizes], [max([min(head, 12), *cells]) for head, *cells in sizes]
    beside, others = sum(2 + n for n in natural[1:left]), range(left, len(sizes))
    natural[0] = min(natural[0], max(first, width - beside - sum(2 + needed[k] for k in others)))
    room, blocks = width - natural[0] - beside, [[]]
    for k in others:
        if blocks[-1] and sum(2 + needed[j] for j in (*blocks[-1], k)) > room:
            blocks.append([])
        blocks[-1].append(k)
    texts = []
    for block in blocks:
        spare = max(0, room - sum(2 + needed[k] for k in block)) // max(1, len(block))
        widths = natural[:left] + [needed[k] + spare for k in block]
        texts.append(aligned(_wrap([(*line[:left], *(line[k] for k in block)) for line in lines], widths), left))
    return "\n\n".join(texts)


def _wrap(lines: list[tuple[str, ...]], widths: list[int]) -> list[tuple[str, ...]]:
    """The lines of a table with long headings, and long cells of the first column, on lines of their own."""
    heads = [wrapped(cell, width)[::-1] for cell, width in zip(lines[0], widths, strict=True)]
    done = list(zip_longest(*heads, fillvalue=""))[::-1]  # short headings at the bottom, just over their cells
    for cell, *others in lines[1:]:
        begin, *rest = wrapped(cell, widths[0])
        if rest:  # indent the lines that continue it
            begin, *rest = wrapped(cell, widths[0] - 2)
        done += [(begin, *others), *((f"  {more}", *[""] * len(others)) for more in rest)]
    return done


# --- Tables in other formats ------------------------------------------------------------------------------------------


def in_markdown(text: str) -> str:
    """A text with the characters escaped that would mean something in markdown."""
    return re.sub(r"([\\`*|<\[~$]|\b_|_\b)", r"\\\1", visible(text))


def markdown(lines: list[tuple[str, ...]], left: int) -> str:
    """A table as GitHub shows it, special characters escaped."""
    header, *rows = ["| " + " | ".join(map(in_markdown, line)) + " |" for line in lines]
    return "\n".join((header, "|" + "---|" * left + "---:|" * (len(lines[0]) - left), *rows))


LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", **{c: f"\\{c}" for c in "&%$#_{}"},
}  # fmt: skip


def latex(lines: list[tuple[str, ...]], left: int, title: str) -> str:
    """A tabular of the package booktabs, its title in a line of its own. Special characters are escaped."""
    text = lambda cell: "".join(LATEX.get(c, c) for c in visible(cell))  # noqa: E731
    header, *rows = [" & ".join(map(text, line)) + r" \\" for line in lines]
    count = len(lines[0])
    return "\n".join((
        rf"\begin{{tabular}}{{{'l' * left}{'r' * (count - left)}}}", r"\toprule",
        rf"\multicolumn{{{count}}}{{l}}{{{text(title)}}} \\", r"\midrule", header, r"\midrule", *rows,
        r"\bottomrule", r"\end{tabular}",
    ))  # fmt: skip


def comma_separated(lines: list[tuple]) -> str:
    """A table as CSV; numbers in full."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue().rstrip("\n")
