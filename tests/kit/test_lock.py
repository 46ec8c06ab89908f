"""requirements.lock: the versions of requirements.txt, each file pinned by its SHA-256, from any index."""

import re

from support import PROJECT

BUILT_HERE = {"pydensecrf2"}  # from source, where there is a compiler; pinned by version only


def pins(name):
    """Return {package: version} of a requirements file."""
    text = (PROJECT / name).read_text(encoding="utf-8")
    found = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in found}


def test_the_lock_holds_every_requirement_at_its_version():
    wanted = {package: version for package, version in pins("requirements.txt").items() if package not in BUILT_HERE}
    locked = pins("requirements.lock")
    differing = {package: locked.get(package) for package, version in wanted.items() if locked.get(package) != version}
    assert differing == {}, "run `make lock`"


def test_every_locked_package_has_hashes_and_no_place():
    text = (PROJECT / "requirements.lock").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=[A-Za-z0-9])", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    assert len(entries) > 50
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
    assert not re.search(r"https?://|file://|--index|--extra|--find|@ ", text)
