"""Reports are listed, and those about the shipped weights are about the weights that are shipped."""

import hashlib
import re

import pytest
from support import PROJECT

REPORTS = PROJECT / "reports"
LIST = REPORTS / "README.md"
WEIGHTS = re.compile(r"^Weights: (.*)$", re.MULTILINE)
ABOUT_WEIGHTS = "## About the shipped weights"


def listed(text: str) -> list[str]:
    """Return the files that a part of the list has a line for."""
    return re.findall(r"^- \[`?([^\]`]+)`?\]\(\1\): \S.*$", text, re.MULTILINE)


def test_every_report_has_a_line_in_the_list():
    # reports/local/ and the page with the tiles are a user's own
    there = {path.name for path in REPORTS.iterdir() if path.is_file()} - {"README.md", "index.html"}
    assert sorted(listed(LIST.read_text(encoding="utf-8"))) == sorted(there)


@pytest.mark.parametrize("report", sorted(REPORTS.glob("*.md")), ids=lambda path: path.name)
def test_a_report_about_the_shipped_weights_names_their_checksum(report):
    expected = f"SHA-256 {hashlib.sha256((PROJECT / 'weights' / 'model.pth').read_bytes()).hexdigest()}"
    assert set(WEIGHTS.findall(report.read_text(encoding="utf-8"))) <= {expected}


def test_reports_that_are_listed_as_being_about_the_shipped_weights_say_which():
    text = LIST.read_text(encoding="utf-8")
    part = text.split(ABOUT_WEIGHTS, 1)[1].split("\n## ", 1)[0]
    reports = [name for name in listed(part) if name.endswith(".md")]
    assert [name for name in reports if not WEIGHTS.search((REPORTS / name).read_text("utf-8"))] == []
