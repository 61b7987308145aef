"""The command line, as a user calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

LAUNCH = Path(__file__).parents[2] / "launch.py"


class Shell:
    """The command line with a home directory of its own.

    Args:
        home: the home directory, where commands are called.
        variables: more of the environment.
    """

    def __init__(self, home: Path, **variables: str) -> None:
        self.home = home
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
            "HOME": str(home), "XDG_STATE_HOME": str(home / "state"), **variables,
        }  # fmt: skip
        self.said: list[str] = []

    def start(self, *arguments: object) -> "subprocess.Popen[str]":
        command = [sys.executable, str(LAUNCH), *map(str, arguments)]
        return subprocess.Popen(
            command, env=self.environment, cwd=self.home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *arguments: object, code: int = 0, seconds: float = 90) -> str:
        """Returns stdout of a command with this exit code; stderr where it is not 0."""
        out, err = (process := self.start(*arguments)).communicate(timeout=seconds)
        self.said += [out, err]
        assert process.returncode == code, f"{arguments} ended with {process.returncode}:\n{out}\n{err}"
        assert "Traceback" not in err
        return out if code == 0 else err

    def ask(self, *arguments: object) -> Any:
        return json.loads(self.run(*arguments, "--json"))
