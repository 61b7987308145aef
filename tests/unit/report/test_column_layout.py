"""Whatever the width of the terminal, a number that is shown is whole, with its error; words give way to it."""

import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType
from support.replies import a_beta, a_status, a_variance, an_info
from support.results import MODES, a_result

from ray_probe.cli.tables.doctor_table import shown as check_shown
from ray_probe.cli.tables.service_tables import beta_table, results_table, status_table, variance_table
from ray_probe.doctor.checks import Check
from ray_probe.report.column_layout import Column, Figures, FittedTable, Prose, Rank, wrapped
from ray_probe.report.result_table import result_table
from ray_probe.run.result import Result

WIDTHS = (40, 60, 80, 100, 200)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?(?: (?:±|\+-) [\d.,]+(?:e[+-]\d+)?)?")
ROOT = Path(__file__).parents[3]


def plain(text: str) -> str:
    """A text without its colours."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def drawn(table: RenderableType, width: int, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=stream, width=width, _environ={}).print(table)
    stream.seek(0)
    return stream.read()


def long_result() -> dict[str, Any]:
    """A result whose numbers are as long as numbers get."""
    result = a_result()
    result["entropy"] = {
        "per_sequence": -123456.789, "per_sequence_se": 1234.5, "per_token": -1.2345e-7, "per_token_se": 1.1e-8,
    }  # fmt: skip
    result["gradient"] = {
        "norm_raw": 1.234e9, "norm_debiased": 2.21e-9, "norm_sq_debiased": 4.9e-18, "trace_cov": 1.234e15, "snr": 1e-7,
    }
    for index, mode in enumerate(MODES):
        result["advantage_mean_square"][mode] = 123456.7 * 10**index
        result["advantage_mean_square_se"][mode] = 1234.5 * 10**index
        result["advantage_mean_square_ratio"][mode] = {"value": 1.2345e-6, "se": 1.2e-8}
        result["advantage_variance"][mode] = -1.2345e-9
    result["advantage_paired"] = [{"mode": "regression", "against": "residual_mu", "difference": -9e8, "se": 1.2e6}]
    result["beta"]["values"] = [-1.2345e-8, 9.8765e12, -39.02]
    result["counts"] |= {"sequences": 123456789, "tokens": 12345678901}
    return result


def a_long_variance() -> RenderableType:
    result = Result.from_json(long_result())
    names = ("advantage_variance", "advantage_mean_square", "advantage_mean_square_ratio", "gradient")
    return variance_table(replace(a_variance(), **{name: getattr(result, name) for name in names}, mode="constant"))


def a_listing() -> RenderableType:
    long = Result.from_json(long_result())
    info = replace(an_info(), id="mine", checkpoint="/runs/a/last")
    items = [
        replace(info, rounds=123456, sequences=12345678),
        replace(info, state="done", entropy=long.entropy, gradient=long.gradient),
    ]
    return results_table(items)


NOW = datetime(2026, 5, 1, 12, 13, 5, tzinfo=UTC)
TABLES: dict[str, tuple[Callable[[], RenderableType], tuple[str, ...]]] = {
    "result": (
        lambda: result_table(Result.from_json(a_result())),
        ("28.41 ± 0.62", "0.921 ± 0.013", "2.81", "3.37", "2,048", "0.95"),
    ),
    "result with all figures": (
        lambda: result_table(Result.from_json(a_result()), verbose=True),
        (
            "28.41 ± 0.62", "0.921 ± 0.013", "412.3 ± 8.7", "118.2 ± 2.5", "24.60 ± 0.52", "17.91 ± 0.38",
            "0.2867 ± 0.0010", "0.0434 ± 0.0010", "-100.3 ± 2.0", "172.1", "-39.02", "2.1e-07", "4,813", "445.4",
        ),
    ),
    "result with long numbers": (
        lambda: result_table(Result.from_json(long_result()), verbose=True),
        (
            "-123,457 ± 1,234", "-1.23e-07 ± 1.1e-08", "123,457 ± 1,234", "1.235e+08 ± 1.2e+06", "1.234e-06 ± 1.2e-08",
            "-9.000e+08 ± 1.2e+06", "-1.235e-09", "123,456,789", "12,345,678,901", "9.876e+12",
        ),
    ),
    "status": (
        lambda: status_table(a_status(), NOW),
        ("28.41 ± 0.62", "81,234", "12,345", "449", "1,024", "0.0434", "12.5", "16"),
    ),
    "beta": (lambda: beta_table(a_beta()), ("0.8123", "-4.310", "-39.02", "0.834", "321,000", "81,234", "2,048")),
    "variance": (
        lambda: variance_table(a_variance()),
        ("412.3", "0.2867 ± 0.0010", "0.0434 ± 0.0010", "17.55", "17.04", "2.81", "3.214", "7.921", "4,813", "3.37"),
    ),
    "variance with long numbers": (
        a_long_variance, ("1.235e+08", "1.234e-06 ± 1.2e-08", "-1.235e-09", "1.234e+15", "1.00e-07"),
    ),
    "results": (a_listing, ("28.41 ± 0.62", "2.81", "3.37", "-123,457 ± 1,234", "2.21e-09", "1.00e-07")),
}  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", TABLES)
def test_every_number_is_whole_with_its_error_at_every_width(name: str, width: int, encoding: str) -> None:
    make, expected = TABLES[name]
    text = drawn(make(), width, encoding)
    said = set(NUMBER.findall(text))
    missing = {number.replace("±", "+-" if encoding == "ascii" else "±") for number in expected} - said
    assert not missing, text
    assert said <= set(NUMBER.findall(drawn(make(), 200, encoding))), "no other number, so none that is cut"
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_a_diagnosis_breaks_between_words_on_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", str(width))
    said = "weights 3.44 MB + gradients 2 x 3.44 MB + activations 33.2 MB + logits 360 kB = 43.8 MB of 1,234,567 MB"
    text = plain(check_shown(Check("device memory", "failed", said, "lower it to 1.5 ± 0.3 GB"), Terminal()))
    assert text.endswith("\n") and max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    assert words == f"failed device memory {said}; lower it to 1.5 ± 0.3 GB"
    assert "1.5 ± 0.3" in text and "1,234,567" in text


COLUMNS = (
    Column("name", least=8), Column("value", right=True), Column("first", rank=Rank.SECONDARY),
    Column("last", rank=Rank.SECONDARY), Column("note", rank=Rank.NOTE, least=10),
)  # fmt: skip
ROW = ("a-long-name-indeed", "12.5 ± 0.3", "alpha", "omega", "words that may go")


@pytest.mark.parametrize(
    ("width", "there", "gone"),
    [
        (80, {"alpha", "omega", "words"}, set()),
        (50, {"alpha", "omega", "words"}, set()),
        (40, {"alpha", "omega"}, {"words", "note"}),
        (30, {"alpha"}, {"omega", "words", "last"}),
        (22, {"value"}, {"alpha", "omega", "words", "first"}),
        (18, {"value"}, {"alpha", "omega", "words"}),
    ],
)
def test_notes_go_first_then_secondary_columns_from_the_last_on(width: int, there: set[str], gone: set[str]) -> None:
    text = drawn(FittedTable(COLUMNS, [ROW]), width)
    assert "12.5 ± 0.3" in text
    assert all(word in text for word in there) and not any(word in text for word in gone), text


def test_then_each_row_is_stacked_with_the_titles_of_its_columns() -> None:
    lines = drawn(FittedTable(COLUMNS, [ROW, ("b", "7", "", "", "")]), 19).splitlines()
    assert [line.rstrip() for line in lines] == ["a-long-name-indeed", "  value  12.5 ± 0.3", "b", "  value  7"]
    figures = Figures([("Part", "a name of length", "12.5 ± 0.3 nats", "note"), ("", "x", "7", "")])
    lines = drawn(figures, 24).splitlines()
    assert [line.rstrip() for line in lines] == ["Part", "  a name of length", "    12.5 ± 0.3 nats", "  x  7"]


def test_a_paragraph_keeps_a_value_with_its_error_and_its_sign() -> None:
    for width in range(12, 40):
        text = drawn(Prose("it is 12.34 ± 0.56 of 7 % there"), width)
        assert "12.34 ± 0.56" in text and "7 %" in text
    assert list(wrapped("aaaa bb", 3)) == ["aaa", "a", "bb"]
    assert list(wrapped("", 10)) == [""]
    assert list(wrapped("one\ntwo  three", 9)) == ["one two", "three"]


def test_headings_that_grow_in_plain_signs_have_room_for_it() -> None:
    table = FittedTable((Column("x"), Column("nats²", right=True)), [("a", "1")])
    assert [line.rstrip() for line in drawn(table, 60, "ascii").splitlines()] == ["x  nats^2", "---------", "a       1"]


@pytest.mark.parametrize("width", [40, 80])
def test_on_a_real_terminal_of_that_width_no_digit_is_cut(tmp_path: Path, width: int) -> None:
    (tmp_path / "result.json").write_text(json.dumps(a_result() | {"schema_version": 1}))
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    command = [sys.executable, str(ROOT / "launch.py"), "results", str(tmp_path), "--verbose"]
    done = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    text = b""
    while chunk := read(leader):
        text += chunk
    os.close(leader)
    assert done.wait(30) == 0
    lines = plain(text.decode()).replace("\r\n", "\n").splitlines()
    assert max(len(line.rstrip()) for line in lines if str(tmp_path) not in line) <= width
    for expected in TABLES["result with all figures"][1]:
        assert any(expected in line for line in lines), expected


def read(descriptor: int) -> bytes:
    """What has come from a terminal; nothing once its other end is closed."""
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""
