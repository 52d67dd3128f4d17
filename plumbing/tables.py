"""Aligned text: tables for the terminal and for results pages."""

import statistics


def aligned(lines: list[tuple[str, ...]], left: int = 2) -> str:
    """Rows of cells to text: the first `left` columns flush left, the others flush right."""
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    cells = [
        [c.ljust(w) if k < left else c.rjust(w) for k, (c, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def mean_std_text(values: list[float]) -> str:
    """ "mean +- standard deviation" with one decimal; the mean alone for one value, "" for none."""
    if not values:
        return ""
    return f"{statistics.fmean(values):.1f}" + (f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def counted(number: int, word: str) -> str:
    """ "1 task", "2 tasks"."""
    return f"{number:,} {word}{'s' * (number != 1)}"


def shortened(text: str, width: int) -> str:
    """A text in one line of at most `width` characters: control characters escaped, its middle left out if need be."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    head = (width - 1) * 2 // 3
    return line if len(line) <= width else f"{line[:head]}…{line[len(line) - (width - 1 - head) :]}"
