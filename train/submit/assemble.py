"""Writes the solution.py that belongs to a model: the kit's own, with the networks put in that it lacks.

A network that solution.py lacks is one module in train/networks/, named like the network in lower case
(GlaViTU: glavitu.py). It imports only the standard library, the grader's packages, and names of `solution`.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path
from typing import Mapping

from prep.files import write_whole
from solution import KitError, find_weights, read_model_file

PROJECT = Path(__file__).resolve().parents[2]
SOLUTION = PROJECT / "solution.py"
NETWORKS = PROJECT / "train" / "networks"
MARK = "# --- Further networks are put in here by train/submit/assemble.py ---\n"
GRADER = {"cv2", "numpy", "PIL", "segmentation_models_pytorch", "sklearn", "tifffile", "torch", "torchvision"}
KNOWN = GRADER | {"tqdm", "solution"} | sys.stdlib_module_names


class AssemblyError(KitError):
    """A network cannot be put into solution.py; the message says why and what to do."""


def assemble(model: Mapping, modules: Path = NETWORKS, solution: Path = SOLUTION) -> str:
    """Return the text of the solution.py that belongs to a model: for a model that names only networks of
    `solution`, that file as it is.

    Args:
        model: the content of a model.pth, as `solution.read_model_file` returns it.
        modules: folder of the further networks.
        solution: the file that they are put into.

    Raises:
        AssemblyError: a network has no module, or its module does not fit into solution.py.
    """
    text = solution.read_bytes().decode("utf-8")
    members = [*model["members"], *filter(None, [model.get("kind")])]
    for name in sorted({member["arch"]["name"] for member in members}):
        if name not in names_of(text):
            module = text_of_module(name, modules / f"{name.lower()}.py", text)
            text = text.replace(MARK, f'{MARK}\n\n{module}\n\n\nNETWORKS["{name}"] = {name}\n')
    return text


def write_solution(model: Mapping, out: Path) -> Path:
    """Write the solution.py that belongs to a model, and return it."""
    text = assemble(model)
    write_whole(out, lambda part: part.write_bytes(text.encode("utf-8")))
    return out


def add_submission_files(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the commands that run a submission."""
    parser.add_argument("--weights", type=Path, default=Path("weights/model.pth"), help="default: %(default)s")
    parser.add_argument("--data", type=Path, help="folder with Band1 ... Band5; default: synthetic tiles")
    parser.add_argument(
        "--solution", type=Path, help="default: the kit's, with the networks put in that the weights name"
    )


def find_solution(given: Path | None, weights: Path, folder: Path) -> Path:
    """Return the solution.py to run: the one given, else the one that belongs to the weights, in `folder`."""
    return given or write_solution(read_model_file(find_weights(weights)), folder / "solution.py")


def names_of(text: str) -> set[str]:
    """Return what a module defines: classes, functions, variables, and the keys of its table NETWORKS."""
    names: set[str] = set()
    for node in ast.parse(text).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {ast.unparse(target) for target in targets}
            if "NETWORKS" in map(ast.unparse, targets) and isinstance(node.value, ast.Dict):
                names |= {ast.literal_eval(key) for key in node.value.keys if key}
    return names


def text_of_module(name: str, path: Path, solution: str) -> str:
    """Return a network's module without its imports of `solution`, the text that it will be a part of.

    Raises:
        AssemblyError: there is no such module, or it would not work in that file.
    """
    if not path.is_file():
        raise AssemblyError(f"network {name!r} is neither in solution.py nor in {path}; write it there")
    source = path.read_bytes().decode("utf-8")
    tree, lines, defined = ast.parse(source), source.splitlines(keepends=True), names_of(source)
    if name not in defined:
        raise AssemblyError(f"{path}: defines no {name}, found {', '.join(sorted(defined)) or 'nothing'}")
    if defined & names_of(solution):
        twice = ", ".join(sorted(defined & names_of(solution)))
        raise AssemblyError(f"{path}: solution.py defines {twice} too; give it another name in this module")
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            fits = {str(module).split(".")[0] for module in imported} <= KNOWN
            if "solution" in imported:
                plain = isinstance(node, ast.ImportFrom) and not any(alias.asname for alias in node.names)
                fits = plain and node in tree.body
            if not fits:
                raise AssemblyError(
                    f"{path}, line {node.lineno}: {ast.unparse(node)}; expected `from solution import "
                    "<names>` at the top, and besides it the grader's packages only"
                )
            if imported[0] in ("solution", "__future__"):
                first, last = node.lineno - 1, node.end_lineno or node.lineno
                lines[first:last] = [""] * (last - first)
    return "".join(lines).strip()
