"""How processes are closed in as the grader's are, and the proof that it holds."""

from __future__ import annotations

import json
from pathlib import Path

from train.submit.callers import Candidate, run_bare
from train.submit.tiles import Case
from train.submit.verdict import CheckResult, judge

HOOK = Path(__file__).with_name("hook")  # holds the sitecustomize.py that Python imports as it starts
# As in sitecustomize.py, which cannot be imported: it would close this process in.
SETTINGS_VARIABLE = "GRADER_SANDBOX"
WRITTEN = ("out", "returned")  # where train.submit.callers leave masks, in the working folder
SCRATCH = "scratch"
# Prints how a process is closed in, then the versions, then what is tried and not refused.
PROBE_CODE = """
import os, socket, subprocess, sys
import sitecustomize, torch, numpy
print(", ".join(sitecustomize.LAYERS))
print("Python %s, torch %s, numpy %s" % (sys.version.split()[0], torch.__version__, numpy.__version__))
for name, attempt in {
    "write beside solution.py": lambda: open("stray", "w").close(),
    "make an input writable": lambda: os.chmod(sys.argv[1], 0o644),
    "connect": lambda: socket.create_connection(("127.0.0.1", 9), 5),
    "start a program": lambda: subprocess.run([sys.executable, "-V"], capture_output=True),
}.items():
    try:
        attempt()
    except PermissionError:
        continue
    except OSError:
        pass
    print("it could " + name)
"""


def sandbox_settings(workdir: Path, scratch: bool = False) -> dict[str, str]:
    """Return the environment variables that close a Python in.

    Only the folders for masks in `workdir` can be written to, and one for temporary files if `scratch`.
    """
    writable = [str(workdir / name) for name in (*WRITTEN, *((SCRATCH,) if scratch else ()))]
    return {
        SETTINGS_VARIABLE: json.dumps({"writable": writable}),
        "PYTHONPATH": str(HOOK),
        "TMPDIR": str(workdir / SCRATCH),
    }


def check_sandbox(candidate: Candidate, case: Case, label: str) -> CheckResult:
    """Try in a sandbox what it has to refuse; return whether it did, with its layers and versions."""
    some_input = next(path for path in sorted(case.data.rglob("*")) if path.is_file())
    run = run_bare(candidate, ["-c", PROBE_CODE, str(some_input)], case)
    layers, versions, *through = run.output.splitlines() if run.status == 0 else ("", "", run.ending)
    faults = [*through, *run.changed_inputs, *run.changed_beside]
    return judge(f"{label}: sandbox", "holds", faults, f"refuses all changes by {layers}; {versions}")
