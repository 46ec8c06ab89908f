"""solution.py is text that the grader's Python 3.9 takes, with no import that the grader lacks."""

import ast
import subprocess
import sys
from typing import Iterator

import pytest
import support

from train.submit.grader.environment import find_python_3_9

SOURCE = (support.PROJECT / "solution.py").read_text(encoding="utf-8")
GRADER_MODULES = {
    "PIL",
    "cv2",
    "numpy",
    "segmentation_models_pytorch",
    "sklearn",
    "tifffile",
    "torch",
    "torchvision",
    "tqdm",
}
ADDED_SINCE = {"annotationlib", "compression", "tomllib"}  # to the standard library, since Python 3.9
STANDARD_MODULES = sys.stdlib_module_names - ADDED_SINCE
TYPES = {"Any", "Path", "bool", "bytes", "dict", "float", "frozenset", "int", "list", "set", "str", "tuple"}
# Keywords of calls that Python 3.9 does not know.
NEWER_KEYWORDS = {"zip": {"strict"}, "dataclass": {"kw_only", "slots", "weakref_slot"}}


def newer_syntax(source: str) -> list[str]:
    """Return what Python 3.9 cannot read, or reads as an undocumented accident of its new parser."""
    # 3.8 as well: 3.9 took parenthesised `with` items, but its documentation has them since 3.10 only.
    for version in ((3, 9), (3, 8)):
        try:
            ast.parse(source, feature_version=version)
        except SyntaxError as error:
            return [f"line {error.lineno}: {error.msg}"]
    return []


def annotations(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all annotations."""
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            if getattr(node, field, None) is not None:
                yield getattr(node, field)


def unions(tree: ast.AST) -> Iterator[ast.BinOp]:
    """Yield all `X | Y`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            yield node


def names_type(node: ast.AST) -> bool:
    """Return whether an operand of `|` is None or one of the commonest types, with or without [...]."""
    if isinstance(node, ast.Subscript):
        return names_type(node.value)
    none = isinstance(node, ast.Constant) and node.value is None
    return none or (isinstance(node, ast.Name) and node.id in TYPES)


def newer_at_run_time(source: str) -> list[str]:
    """Return what Python 3.9 reads but fails at when it runs: unions of types, keywords of newer versions."""
    tree = ast.parse(source)
    postponed = "from __future__ import annotations" in source
    faults = []
    if not postponed:
        faults += [union for annotation in annotations(tree) for union in unions(annotation)]
    written = {id(node) for annotation in annotations(tree) for node in ast.walk(annotation)}
    faults += [
        union
        for union in unions(tree)
        if id(union) not in written and (names_type(union.left) or names_type(union.right))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            newer = NEWER_KEYWORDS.get(called, set()) & {keyword.arg for keyword in node.keywords}
            faults += [node] * bool(newer)
    return [f"line {node.lineno}: {ast.unparse(node)}" for node in faults]


def catches_import_error(handler: ast.ExceptHandler) -> bool:
    """Return whether `except ...` catches a failed import by its name."""
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(getattr(kind, "id", "") in ("ImportError", "ModuleNotFoundError") for kind in kinds)


def optional_imports(tree: ast.AST) -> set[int]:
    """Return the ids of the nodes whose failed import is caught."""
    return {
        id(node)
        for attempt in ast.walk(tree)
        if isinstance(attempt, ast.Try) and any(map(catches_import_error, attempt.handlers))
        for statement in attempt.body
        for node in ast.walk(statement)
    }


def foreign_imports(source: str) -> list[str]:
    """Return the modules that the grader does not have and whose absence is not caught."""
    tree = ast.parse(source)
    optional, found = optional_imports(tree), []
    for node in ast.walk(tree):
        if id(node) in optional:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append("." * node.level + (node.module or ""))
    return [name for name in found if name.split(".")[0] not in STANDARD_MODULES | GRADER_MODULES]


# --- The submission -------------------------------------------------------------------------------


def test_submission_is_python_3_9():
    assert newer_syntax(SOURCE) == []
    assert newer_at_run_time(SOURCE) == []


def test_submission_imports_what_the_grader_has():
    assert foreign_imports(SOURCE) == []


def test_python_3_9_compiles_the_submission():
    """f-strings of Python 3.12 are no fault to the parser of a newer Python."""
    interpreter = find_python_3_9()
    if interpreter is None:
        pytest.skip("no Python 3.9 on PATH, in pyenv or in uv")
    code = "import sys; compile(sys.stdin.buffer.read(), 'solution.py', 'exec')"
    done = subprocess.run([interpreter.path, "-c", code], input=SOURCE.encode(), capture_output=True)
    assert (done.returncode, done.stderr.decode()) == (0, "")


# --- That these tests can fail --------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "match 1:\n    case 1:\n        pass",
        "with (open('a') as a, open('b') as b):\n    pass",
        "try:\n    pass\nexcept* ValueError:\n    pass",
        "def f(a b): pass",
    ],
)
def test_newer_syntax_is_found(source):
    assert len(newer_syntax(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "def f(x: int | None): pass",
        "def f() -> dict[str, int | None]: pass",
        "def f(*args: Foo | Bar): pass",
        "x: Foo | Bar = 1",
        "class A(NamedTuple):\n    x: Foo | Bar",
        "Alias = str | Foo",
        "isinstance(x, list[int] | Foo)",
        "from __future__ import annotations\nAlias = Foo | None",
        "zip(a, b, strict=True)",
        "@dataclasses.dataclass(slots=True)\nclass A: pass",
    ],
)
def test_newer_run_time_is_found(source):
    assert len(newer_at_run_time(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "nodata = (pixels == 0) | ~np.isfinite(pixels)",
        "flags = os.O_RDWR | os.O_CREAT",
        "from __future__ import annotations\ndef f(x: int | None) -> Foo | Bar: pass",
        "zip(a, b)",
    ],
)
def test_older_run_time_is_let_pass(source):
    assert newer_at_run_time(source) == []


@pytest.mark.parametrize(
    ("source", "foreign"),
    [
        ("import scipy.ndimage", ["scipy.ndimage"]),
        ("from prep import store", ["prep"]),
        ("from . import store", ["."]),
        ("import tomllib", ["tomllib"]),
        ("def f():\n    import timm", ["timm"]),
        ("try:\n    import timm\nexcept ValueError:\n    pass", ["timm"]),
        ("try:\n    pass\nexcept ImportError:\n    import timm", ["timm"]),
        ("try:\n    import timm\nexcept (OSError, ImportError):\n    timm = None", []),
        ("import os.path, numpy as np\nfrom torch import nn", []),
    ],
)
def test_foreign_imports_are_found(source, foreign):
    assert foreign_imports(source) == foreign
