"""The tables of README.md and results/REPORT.md, which the commands above them print from the runs that are kept.

python -m tests.published    # prints them anew into both pages
"""

import contextlib
import io
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from bench import report
from bench.core.files import atomic_path

ROOT = Path(__file__).parent.parent
KEPT = "results/kept"
PAGES = ("README.md", "results/REPORT.md")
# A command in a line of its own, and what follows it: titles, tables, and notes between them.
PRINTED = re.compile(
    r"^`python -m bench\.report ([^`\n]*)`:\n\n"
    r"((?:\*\*.*\*\*\n\n(?:(?:\|.*\n)+\n?)+(?:(?:[†‡]|Intervals are|Where further|The first) .*\n\n?)*)*)",
    re.MULTILINE,
)


def printed(page: str) -> Iterator[tuple[str, str]]:
    """The arguments of each command in a page, and the text below it that it is to have printed."""
    for found in PRINTED.finditer((ROOT / page).read_text(encoding="utf-8")):
        yield found[1], found[2].rstrip("\n")


def output(arguments: str) -> str:
    """What bench.report prints for the ``arguments``, wherever it is called from. ValueError where it fails."""
    words = [str(ROOT / word) if word == KEPT else word for word in shlex.split(arguments)]
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        if report.main(words):
            raise ValueError(f"bench.report {arguments} failed")
    return text.getvalue().rstrip("\n")


def main() -> None:
    """Prints all tables anew."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        renewed = PRINTED.sub(lambda found: f"`python -m bench.report {found[1]}`:\n\n{output(found[1])}\n\n", text)
        with atomic_path(ROOT / page) as temporary:
            temporary.write_text(renewed.rstrip("\n") + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
