"""CONTRIBUTING.md lists what `make test` leaves out, and what it runs instead."""

import re

from support.pages import ROOT, page

ROWS = [
    row.split(" | ")
    for row in re.findall(r"^\| (`tests/.+) \|$", page("CONTRIBUTING.md").section("Slow tests"), re.MULTILINE)
]


def files_in(text: str) -> set[str]:
    return set(re.findall(r"`(tests/[\w/]+\.py)`", text))


def test_every_file_with_slow_tests_is_listed_and_no_other() -> None:
    marked = {
        str(path.relative_to(ROOT))
        for directory in ("faults", "integration", "unit", "docs")
        for path in (ROOT / "tests" / directory).rglob("test_*.py")
        if "pytest.mark.slow" in path.read_text(encoding="utf-8") and path.name != "test_slow_tests.py"
    }
    assert {name for slow, _, _ in ROWS for name in files_in(slow)} == marked


def test_what_is_run_instead_is_there() -> None:
    for _, _, instead in ROWS:
        assert all((ROOT / name).is_file() for name in files_in(instead)), instead
