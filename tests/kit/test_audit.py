"""`make audit`: what it makes of pip-audit's report, above all where nothing was audited."""

import importlib.util

import pytest
from support import PROJECT

spec = importlib.util.spec_from_file_location("audit", PROJECT / ".ci" / "audit.py")
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)

SAFE = {"name": "a", "version": "1.0", "vulns": []}
SKIPPED = {"name": "b", "skip_reason": "Dependency not found on PyPI and could not be audited: b (2.0)"}
FLAWED = {"name": "c", "version": "3.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3.1", "4.0"]}]}


@pytest.mark.parametrize(
    ("packages", "status", "words"),
    [
        ([SAFE], 0, ["0 known vulnerabilities in 1 packages"]),
        ([SAFE, SKIPPED], 0, ["0 known vulnerabilities in 1 packages", "not known to the service: b"]),
        ([SAFE, FLAWED], 1, ["c 3.0: PYSEC-1, mended in 3.1, 4.0", "1 known vulnerabilities in 2"]),
        ([SKIPPED, SKIPPED], 3, ["NOT AUDITED", "none of 2 packages"]),
        ([], 3, ["NOT AUDITED"]),
    ],
)
def test_a_service_that_knows_nothing_is_no_all_clear(packages, status, words):
    found, said = audit.judge(packages)
    assert found == status and all(word in said for word in words), said


def test_a_tool_that_ends_without_a_report_has_audited_nothing(tmp_path):
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "pip-audit"
    tool.write_text("#!/bin/sh\necho 'no route to host' >&2\nexit 1\n")
    tool.chmod(0o755)
    status, said = audit.audit(tmp_path, PROJECT / "requirements.lock")
    assert status == 3 and "no route to host" in said
