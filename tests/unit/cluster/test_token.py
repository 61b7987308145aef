"""A token that would end Ray's process is refused before Ray reads it."""

import os
from pathlib import Path

import pytest

from ray_probe.cluster.head.auth_token import MAX_TOKEN_BYTES, require_token, token_place
from ray_probe.errors import ClusterError

TOKEN = "0123456789abcdef" * 4
USABLE = {
    "alone": TOKEN, "a line": f"{TOKEN}\n", "CRLF": f"{TOKEN}\r\n", "blanks around": f" \t{TOKEN} \n\n",
    "more lines": f"{TOKEN}\nsecond\n", "of another kind": "a token, with blanks",
}  # fmt: skip
FLAWED = {
    "BOM": (b"\xef\xbb\xbf" + TOKEN.encode(), "begins with a byte order mark (BOM); save it as ASCII without one"),
    "UTF-16": (TOKEN.encode("utf-16"), "begins with a byte order mark"),
    "blank first line": (f"\n{TOKEN}\n".encode(), "its first line is blank; put the token there, alone"),
    "empty": (b"", "its first line is blank"),
    "accent": (f"{TOKEN}é".encode(), "byte 65 of the token is not printable ASCII; write the token again"),
    "tab inside": (b"ab\tcd", "byte 3 of the token is not printable ASCII"),
    "zero byte": (f"{TOKEN}\0".encode(), "byte 65 of the token is not printable ASCII"),
    "another file": (b"x" * (MAX_TOKEN_BYTES + 1), "longer than a token (8192 bytes); name the file of the token"),
}


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where a test puts the token that Ray is to send."""
    for name in [n for n in os.environ if n.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    return tmp_path / "token"


@pytest.mark.parametrize("text", USABLE.values(), ids=USABLE)
def test_a_token_that_ray_can_send_is_taken_as_it_is(token: Path, text: str) -> None:
    token.write_text(text, newline="")
    require_token("h:1")
    assert token_place() == str(token)


@pytest.mark.parametrize(("data", "flaw"), FLAWED.values(), ids=FLAWED)
def test_a_token_that_would_end_the_process_is_refused_in_one_line_without_it(
    token: Path, data: bytes, flaw: str
) -> None:
    token.write_bytes(data)
    with pytest.raises(ClusterError) as refused:
        require_token("h:1")
    said = str(refused.value)
    assert said.startswith(f"RAY_AUTH_TOKEN_PATH: got '{token}'; ") and flaw in said
    assert "\n" not in said and TOKEN[:8] not in said
    assert token_place() is None


def test_the_variable_is_looked_at_before_the_file(token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token.write_text(TOKEN)
    monkeypatch.setenv("RAY_AUTH_TOKEN", f"{TOKEN}\nsecond")
    with pytest.raises(ClusterError, match=r"^RAY_AUTH_TOKEN: byte 65 of the token is not printable ASCII"):
        require_token("h:1")
    monkeypatch.setenv("RAY_AUTH_TOKEN", f" {TOKEN}\n")
    require_token("h:1")
    assert token_place() == "RAY_AUTH_TOKEN"


def test_a_token_file_that_is_not_there_is_named(token: Path) -> None:
    with pytest.raises(ClusterError, match=r"^RAY_AUTH_TOKEN_PATH: got .*no readable token \(No such file"):
        require_token("h:1")
