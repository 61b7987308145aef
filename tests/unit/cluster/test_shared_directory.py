"""A directory is shared when every node reads a file that is written here."""

from pathlib import Path
from typing import Any

import pytest

from ray_probe.cluster.connection import nodes
from ray_probe.cluster.connection.nodes import Answer, Node
from ray_probe.cluster.connection.shared_directory import can_read, check_shared
from ray_probe.errors import OutputError

NODES = [Node("aa", "first (10.0.0.1)", {"CPU": 2.0}), Node("bb", "second (10.0.0.2)", {"CPU": 2.0})]


def answered(monkeypatch: pytest.MonkeyPatch, *values: Any) -> None:
    """Nodes that answer so, having looked for the file while it was there."""

    def ask(nodes: list[Node], function: Any, path: str, text: str, seconds: float) -> list[Answer]:
        assert can_read(path, text, 0.0) and not can_read(path, "another", 0.0)
        return [Answer(node, value) for node, value in zip(nodes, values, strict=True)]

    monkeypatch.setattr(nodes, "ask_nodes", ask)


def test_the_nodes_that_cannot_read_the_directory_are_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    answered(monkeypatch, True, True)
    assert check_shared(tmp_path, NODES) == []
    answered(monkeypatch, True, False)
    assert check_shared(tmp_path, NODES) == NODES[1:]
    answered(monkeypatch, None, True)  # it did not answer
    assert check_shared(tmp_path, NODES) == NODES[:1]


def test_looking_at_shared_storage_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    answered(monkeypatch, True, True)
    (tmp_path / "there").mkdir()
    check_shared(tmp_path / "there", NODES)
    check_shared(tmp_path / "made" / "for" / "it", NODES)
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and list((tmp_path / "there").iterdir()) == []


def test_a_directory_that_cannot_be_written_here_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"output\.dir: .* cannot be written"):
        check_shared(tmp_path / "file" / "runs", NODES)
