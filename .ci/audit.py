"""Looks up the pinned packages among the known vulnerabilities: `make audit`, by pip-audit.

Exit status: 0 none known, 1 some known, 3 nothing was audited, since the tool could not be installed or the
service that knows the vulnerabilities could not be reached. pip-audit itself calls a service that knows no
package at all an all-clear.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
TOOL = "pip-audit==2.10.1"
HOME = PROJECT / ".cache" / "audit"  # an environment of its own: the tool is no part of the kit
TIMEOUT = 15  # seconds, for each answer of the service
CLEAN, VULNERABLE, NOT_AUDITED = 0, 1, 3


def install(home: Path) -> str | None:
    """Make an environment with the tool; return why that failed, or None."""
    if (home / "bin" / "pip-audit").is_file():
        return None
    venv.create(home, with_pip=True, clear=True)
    command = [str(home / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    ended = subprocess.run([*command, "install", TOOL], capture_output=True, text=True)
    return None if ended.returncode == 0 else f"{TOOL} cannot be installed: {last_line(ended.stderr)}"


def audit(home: Path, requirements: Path) -> tuple[int, str]:
    """Return the exit status and what to say of the packages that `requirements` pins."""
    command = [str(home / "bin" / "pip-audit"), "--requirement", str(requirements), "--format", "json"]
    options = ["--disable-pip", "--no-deps", "--progress-spinner", "off", "--timeout", str(TIMEOUT)]
    ended = subprocess.run([*command, *options], capture_output=True, text=True)
    try:
        return judge(json.loads(ended.stdout)["dependencies"])
    except (ValueError, KeyError):
        return NOT_AUDITED, f"NOT AUDITED: pip-audit ended with {last_line(ended.stderr)}"


def judge(packages: list[dict]) -> tuple[int, str]:
    """Return the exit status and the text for pip-audit's list of packages."""
    known = [package for package in packages if "skip_reason" not in package]
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    lines = [
        f"{package['name']} {package['version']}: {flaw['id']}, mended in "
        f"{', '.join(flaw['fix_versions']) or 'no version'}"
        for package in known
        for flaw in package["vulns"]
    ]
    if not known:
        return NOT_AUDITED, (
            f"NOT AUDITED: the service of vulnerabilities cannot be reached, or knows none of "
            f"{len(packages)} packages; try again where it can"
        )
    missed = f"; not known to the service: {', '.join(unknown)}" if unknown else ""
    lines.append(f"{len(lines)} known vulnerabilities in {len(known)} packages{missed}")
    return VULNERABLE if len(lines) > 1 else CLEAN, "\n".join(lines)


def last_line(text: str) -> str:
    """Return the last line of what a program said."""
    return (text.strip().splitlines() or ["nothing"])[-1]


def main() -> int:
    """Audit requirements.lock; return the exit status."""
    problem = install(HOME)
    status, said = (NOT_AUDITED, f"NOT AUDITED: {problem}") if problem else audit(HOME, PROJECT / "requirements.lock")
    print(f"audit: {said}")
    return status


if __name__ == "__main__":
    sys.exit(main())
