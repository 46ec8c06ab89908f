"""docs/settings.md says what train/config.py does."""

import runpy

from support import PROJECT

PAGE = (PROJECT / "docs" / "settings.md").read_text(encoding="utf-8")


def test_the_page_of_settings_is_current():
    made = runpy.run_path(str(PROJECT / ".ci" / "settings_table.py"))["page"]()
    assert made == PAGE, "run `python .ci/settings_table.py --write`"


def test_every_setting_has_an_effect():
    rows = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    assert [row[0] for row in rows if not row[-1].strip(" |")] == []
