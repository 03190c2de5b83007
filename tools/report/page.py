"""report.html: the whole report as one document that needs no other file and no network."""

import base64
from pathlib import Path

import jinja2

from report import figures


def render(report, folder):
    """The text of report.html from the report of evaluate.py and the pictures in its `folder`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = ("confused_pairs", "mistakes", "confusion")
    return environment.get_template("report.html").render(
        report=report,
        remarks=figures.remarks(report),
        comparison_sentence=figures.comparison_sentence,
        calibration_bins=figures.CALIBRATION_BINS,
        pictures={name: base64.b64encode((folder / f"{name}.png").read_bytes()).decode() for name in names},
    )
