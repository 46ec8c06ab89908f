"""How processes are closed in as the grader's are, and the proof that it holds."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Mapping, NamedTuple, Sequence

from train.submit.check.cases import Case
from train.submit.check.processes import Candidate, describe_status, run_bare, submitted_files
from train.submit.check.verdict import CheckResult, judge

HOOK = Path(__file__).with_name("hook")  # holds the sitecustomize.py that Python imports as it starts
PROBE = Path(__file__).with_name("probe.py")
SETTINGS_VARIABLE = (
    "GRADER_SANDBOX"  # as in that file, which cannot be imported: it would close this process in
)

WRITTEN = ("out", "returned")  # where the callers of train.submit.check leave masks, in the working folder
SCRATCH = "scratch"
PACKAGES = ("torch", "torchvision", "segmentation_models_pytorch", "numpy", "opencv-python-headless")
ABSENT = ("pydensecrf",)


class Report(NamedTuple):
    """What a closed-in Python says of itself.

    `layers`: what holds there. `through`: attempts that were not refused. `present`: packages that the grader
    does not have.
    """

    layers: Sequence[str]
    through: Sequence[str]
    python: str
    versions: Mapping[str, str | None]
    present: Sequence[str]

    @property
    def label(self) -> str:
        """The versions in words."""
        packages = [f"{package} {version}" for package, version in self.versions.items() if version]
        return ", ".join([f"Python {self.python}", *packages])


def sandbox_settings(workdir: Path, path: Sequence[Path] = (), scratch: bool = False) -> dict[str, str]:
    """Return the environment variables that close a Python in, with the folders `path` first on its path.

    Only the folders for masks in `workdir` can be written to, and one for temporary files if `scratch`.
    """
    writable = [str(workdir / name) for name in (*WRITTEN, *((SCRATCH,) if scratch else ()))]
    search = [*map(str, path), str(HOOK)]
    return {
        SETTINGS_VARIABLE: json.dumps({"writable": writable}),
        "PYTHONPATH": ":".join(search),
        "TMPDIR": str(workdir / SCRATCH),
    }


def probe(candidate: Candidate, case: Case) -> tuple[list[CheckResult], Report | None]:
    """Try in the candidate's sandbox what it has to refuse; return the result and what it says of itself."""
    some_input = next(path for path in sorted(case.data.rglob("*")) if path.is_file())
    request = {
        "input": str(some_input),
        "temporary": tempfile.gettempdir(),
        "packages": PACKAGES,
        "absent": ABSENT,
    }
    arguments = ["-c", PROBE.read_text(), json.dumps(request)]
    run = run_bare(candidate, submitted_files(candidate), arguments, case)
    subject = f"{case.label}: sandbox"
    expected = "nothing is written, reached or started"
    if run.status != 0:
        return [judge(subject, "holds", [describe_status(run)], expected)], None
    report = Report(**json.loads(run.last_words))
    faults = [f"it could {what}" for what in report.through] + run.changed_inputs + run.changed_beside
    return [judge(subject, "holds", faults, expected)], report
