"""Prints docs/walkthrough.md: the sections of walkthrough.py, each with what it prints.

    python docs/render_walkthrough.py > docs/walkthrough.md

tests/test_docs.py makes the page again and compares.
"""

import contextlib
import io
import re
from pathlib import Path

HERE = Path(__file__).parent
LINKS = "lora.py poly.py mhr.py".split()  # beside the line that all pages begin with


def page(source: str) -> str:
    """The page for a file whose sections begin with print("\\n1. A heading") and, in comments, prose."""
    intro, _, begin = source.removeprefix('"""').partition('"""\n')
    begin, *sections = re.split(r'^print\("\\n(\d+\. .*)"\)\n', begin, flags=re.M)
    head, _, shapes = (text.replace("\n", " ") for text in intro.strip().split("\n\n"))
    links = " | ".join(f"[{name}](../{name})" for name in LINKS)
    pages = (HERE / "methods.md").read_text().splitlines()[0]
    scope, parts = {}, [f"{pages}\n\n# LoRA, Poly and MHR in one file\n\n{links}\n"]
    parts.append(
        f"{head} This page is [walkthrough.py](walkthrough.py), section by section, each followed by what it prints; to"
        " run it, `python docs/walkthrough.py`; it needs torch, and for the last section this repository.\n"
    )
    parts.append(f"{shapes}\n\n{run(begin, scope)}")
    for heading, section in zip(sections[::2], sections[1::2], strict=True):
        comments = re.match(r"(?:#.*\n)*", section).group()
        prose = re.sub(r"^# ", "", comments, flags=re.M)
        parts.append(f"## {heading}\n\n{prose}\n{run(section.removeprefix(comments), scope)}")
    return "\n".join(parts)


def run(code: str, scope: dict) -> str:
    """The code as a block, and what it prints as another."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, scope)
    text = f"```python\n{code.strip()}\n```\n"
    return text + (f"\n```text\n{printed.getvalue().rstrip()}\n```\n" if printed.getvalue() else "")


if __name__ == "__main__":
    print(page((HERE / "walkthrough.py").read_text()), end="")
