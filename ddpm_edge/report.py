"""An evaluation as a table, as JSON and as a page that needs no other file."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_edge.arrays import Array, Float64
from ddpm_edge.evaluate import Compared, Evaluation
from ddpm_edge.files import write_bytes
from ddpm_edge.images import grid, to_png

SHOWN = 64  # samples in the page
POINTS = 40  # of the curve
BETTER = {  # which way a figure is better
    "Frechet distance": "lower", "kernel distance": "lower", "precision": "higher",
    "recall": "higher", "class KL": "lower", "recognised": "higher", "bits/dim": "lower",
    "nearest training image": "1: as far from the training images as test images are; 0: copies",
}  # fmt: skip
COLUMNS = ("figure", "value", "standard error", "floor", "ceiling", "better")
COMPARED = ("figure", "a", "b", "difference", "standard error", "significant")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .8em; text-align: right }
td:first-child, th:first-child { text-align: left } tr { border-bottom: 1px solid #ddd }
img { image-rendering: pixelated; max-width: 100% } svg text { font-size: 11px; fill: #555 }
"""


def rows(evaluation: Evaluation) -> list[list[str]]:
    """A row for every figure, as COLUMNS."""
    return [
        [
            name,
            number(figure.value),
            number(figure.standard_error),
            *(
                number(part[name].value) if name in part else ""
                for part in (evaluation.floor, evaluation.ceiling)
            ),
            BETTER[name],
        ]
        for name, figure in evaluation.figures.items()
    ]


def compared_rows(compared: Sequence[Compared]) -> list[list[str]]:
    """A row for every figure that both have, as COMPARED."""
    return [
        [
            row["figure"],
            number(row["a"]),
            number(row["b"]),
            f"{row['difference']:+.4g}",
            number(row["standard_error"]),
            "yes" if row["significant"] else "no",
        ]
        for row in compared_json(compared)
    ]


def compared_json(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """The same, as numbers."""
    return [
        {
            "figure": name,
            "a": a.value,
            "b": b.value,
            "difference": difference.value,
            "standard_error": difference.standard_error,
            "significant": difference.significant,
        }
        for name, a, b, difference in compared
    ]


def number(value: float) -> str:
    """Four digits."""
    return f"{value:.4g}"


def text_table(columns: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first to the left."""
    lines = [columns, *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, len(widths) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def write_report(
    evaluation: Evaluation, folder: Path, compared: Sequence[Compared] = (), other: str = ""
) -> None:
    """Write `report.json` and `report.html` into a folder, which is made.

    Raises:
        OSError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    document = evaluation.to_dict()
    if compared:
        document["compared"] = [
            dict(zip(COMPARED, r, strict=True)) for r in compared_rows(compared)
        ]
    write_bytes(folder / "report.json", (json.dumps(document, indent=1) + "\n").encode())
    page = "\n".join(_page(evaluation, compared, other))
    write_bytes(folder / "report.html", page.encode())


def _page(evaluation: Evaluation, compared: Sequence[Compared], other: str) -> Iterator[str]:
    settings = evaluation.settings
    title = html.escape(f"{settings['model']}, {settings['variant']}, {settings['plan']}")
    yield f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>'
    yield f"<style>{STYLE}</style>\n<h1>{title}</h1>"
    yield _table(COLUMNS, rows(evaluation))
    yield (
        f"<p>Floor: {settings['n']} training images in the place of the samples. Ceiling: the real "
        "images under noise. Standard errors are by the choice of images.</p>"
    )
    if compared:
        yield f"<h2>Beside {html.escape(other)} (a); this is b</h2>"
        yield _table(COMPARED, compared_rows(compared))
    yield f"<h2>Samples</h2>{_image(evaluation.samples[:SHOWN], 8)}"
    if len(evaluation.alike):
        pairs = np.concatenate([evaluation.samples[evaluation.alike], evaluation.nearest_training])
        yield (
            "<h2>The samples nearest to training images (above), and those (below)</h2>"
            f"{_image(pairs, len(evaluation.alike))}"
        )
    if np.isfinite(evaluation.x0_mse).any():
        yield "<h2>How far off x<sub>0</sub> is predicted at timestep t</h2>"
        yield _curve(127.5 * np.sqrt(evaluation.x0_mse))
    yield f"<h2>Settings</h2>{_settings(settings, evaluation.seconds)}</html>"


def _table(columns: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in body]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _settings(settings: Mapping[str, Any], seconds: float) -> str:
    told = {**settings, "seconds": f"{seconds:.0f}"}
    return _table(("", ""), [[name, str(value)] for name, value in told.items()])


def _image(images: Array, columns: int) -> str:
    data = base64.b64encode(to_png(grid(images, columns, None))).decode()
    return f'<img alt="" src="data:image/png;base64,{data}">'


def _curve(values: Float64) -> str:
    """Values at t = 1, 2, ..., the known ones, as SVG: means of some timesteps each."""
    width, height, left, bottom = 640, 260, 50, 30
    known = np.flatnonzero(np.isfinite(values))
    parts = np.array_split(known, min(POINTS, len(known)))
    t = np.array([part.mean() for part in parts])
    y = np.array([values[part].mean() for part in parts])
    top = float(y.max()) * 1.05 or 1.0
    across = left + t / max(1, len(values) - 1) * (width - left - 10)
    up = (height - bottom) * (1 - y / top)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, up, strict=True))
    marks = "".join(
        f'<line x1="{left}" x2="{width}" y1="{h:.1f}" y2="{h:.1f}" stroke="#ddd"/>'
        f'<text x="{left - 6}" y="{h + 4:.1f}" text-anchor="end">{top * share:.0f}</text>'
        for share in (0.0, 0.25, 0.5, 0.75)
        for h in [(height - bottom) * (1 - share)]
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}">{marks}'
        f'<polyline points="{points}" fill="none" stroke="#06c" stroke-width="1.5"/>'
        f'<text x="{left}" y="{height - 8}">t = 1</text>'
        f'<text x="{width - 10}" y="{height - 8}" text-anchor="end">t = {len(values)}</text>'
        f'<text x="{left + 6}" y="12">root of the mean square error, grey levels of 0..255</text>'
        "</svg>"
    )
