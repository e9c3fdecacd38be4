"""The page of a report: one file that works offline, with charts, tables and a viewer of reconstructions in it."""

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from .charts import Chart
from .frames import LABELS
from .rankings import FIRST, RANKED
from .tables import BRIEF, heading
from .vectors import embedded
from .viewer import Viewer

if TYPE_CHECKING:
    from .report import Report

FILES = {"pictures": "reconstructions.png", "curves": "curves.png", "config": "config.json"}  # of a run, by their link


def html(report: "Report", figures: Sequence[Chart], viewer: Viewer | None, folder: Path) -> str:
    """The page, which lies in ``folder`` and links to run folders from there. Reads the files of ``figures``."""
    loader = FileSystemLoader(Path(__file__).parent)
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)

    def links(run: str) -> dict[str, str]:
        """Those of FILES that a run folder has, by what their links say."""
        there = {words: Path(run, name) for words, name in FILES.items()}
        return {words: quote(os.path.relpath(path, folder)) for words, path in there.items() if path.is_file()}

    page.filters["image"] = lambda pixels: address(Image.fromarray(pixels))
    return page.get_template("report.html.jinja").render(
        report=report,
        pictures=[(chart, _picture(chart)) for chart in figures],
        viewer=viewer,
        heading=heading,
        links=links,
        METRICS=LABELS,
        brief=BRIEF,
        minor={*RANKED} - {*FIRST},
    )


def _picture(chart: Chart) -> Markup | str:
    """What the page shows of a chart below its title: the SVG, or of photographs the PNG as an address."""
    if chart.drawn:
        return Markup(embedded(chart.path.with_suffix(".svg").read_text(encoding="utf-8")))
    with Image.open(chart.path) as picture:
        return address(picture.crop((0, chart.head, picture.width, picture.height)))


def address(picture: Image.Image) -> str:
    """A picture as the address of a PNG, which holds it whole."""
    written = io.BytesIO()
    picture.save(written, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"
