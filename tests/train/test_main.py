"""The command line of training: what it refuses is said in the words of the one who called it."""

import re

from support import PROJECT

from train.__main__ import MAKE_NAMES, in_words_of_caller, main

MAKEFILE = (PROJECT / "Makefile").read_text(encoding="utf-8")


def test_what_make_is_refused_names_its_variables(monkeypatch, capsys, tmp_path):
    command = ["score", "--run", str(tmp_path / "a--run b"), f"data.store={tmp_path}", "optim.lr=x"]
    assert main(command) == 2 and "optim.lr" in capsys.readouterr().err
    said = "Name another folder with --run, or --no-run; --overwrite (--overwrite-not); `x --run y`"
    monkeypatch.delenv("CALLED_BY_MAKE", raising=False)
    assert in_words_of_caller(said) == said
    monkeypatch.setenv("CALLED_BY_MAKE", "yes")
    changed = "Name another folder with RUN=, or --no-run; OVERWRITE=yes (--overwrite-not); `x --run y`"
    assert in_words_of_caller(said) == changed


def test_those_variables_are_in_the_makefile():
    for variable in MAKE_NAMES.values():
        assert f"$({variable.partition('=')[0]})" in MAKEFILE or f"$(if $({variable.partition('=')[0]})" in MAKEFILE
    lines = [line for line in MAKEFILE.splitlines() if re.search(r"-m train\b", line)]
    assert lines == ["TRAIN := CALLED_BY_MAKE=yes $(PY) -m train"]
