"""Calls the configured program and address, without holding up a measurement."""

import json
import os
import shlex
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_probe.config.reporting import NotifyConfig
from ray_probe.errors import first_line
from ray_probe.system.background import Background

COMMAND_S = 60.0
WEBHOOK_S = 10.0
WEBHOOK_TRIES = 3
HANGS_S = COMMAND_S + WEBHOOK_TRIES * WEBHOOK_S + 5.0
"""More than the time-outs of one notification together."""


@dataclass(frozen=True)
class Ending:
    """The end of a measurement.

    Attributes:
        state: done, failed or cancelled.
        directory: of the run.
        info: the measurement, plain JSON types.
        result: its result.json, plain JSON types; None without one.
    """

    state: str
    directory: Path
    info: dict[str, Any]
    result: dict[str, Any] | None


class Notifier:
    """Notifies of ended measurements in a thread of its own.

    Args:
        config: what is called.
        warn: receives one line a measurement where something fails.
        command_s: time-out of the program, seconds.
        webhook_s: time-out of one try of the address, seconds.
    """

    def __init__(
        self, config: NotifyConfig, warn: Callable[[str], None],
        command_s: float = COMMAND_S, webhook_s: float = WEBHOOK_S,
    ) -> None:  # fmt: skip
        self._config, self._command_s, self._webhook_s = config, command_s, webhook_s
        self._background = Background("notify", warn, once=False, hangs_s=HANGS_S)

    def notify(self, ending: Callable[[], Ending]) -> None:
        """Call what is configured, with what `ending` returns; returns at once."""
        if self._config.command is not None or self._config.webhook is not None:
            self._background.do(lambda: self._notify(ending()))

    @property
    def idle(self) -> bool:
        """Whether all notifications have been given."""
        return self._background.idle

    def _notify(self, ending: Ending) -> None:
        """Call the program and the address; one error names what failed."""
        failures = []
        if self._config.command is not None:
            failures += _failure("notify.command", lambda: self._run(str(self._config.command), ending))
        if self._config.webhook is not None:
            failures += _failure("notify.webhook", lambda: self._post(str(self._config.webhook), ending))
        if failures:
            raise RuntimeError(f"{ending.info.get('id', '')}: {'; '.join(failures)}")

    def _run(self, command: str, ending: Ending) -> None:
        """Run the program with the result on stdin."""
        path = ending.directory / "result.json"
        environment = os.environ | {
            "RAY_PROBE_RESULT": str(path) if ending.result is not None else "",
            "RAY_PROBE_DIRECTORY": str(ending.directory), "RAY_PROBE_STATE": ending.state,
        }  # fmt: skip
        data = json.dumps(ending.result).encode()
        with subprocess.Popen(
            shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env=environment, start_new_session=True,
        ) as process:  # fmt: skip
            try:
                _, said = process.communicate(data, self._command_s)
            except subprocess.TimeoutExpired:
                _end_group(process)
                raise TimeoutError(f"took more than {self._command_s:g} s and was ended") from None
        if process.returncode:
            last = said.decode(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(": ".join([f"exit code {process.returncode}", *last]))

    def _post(self, address: str, ending: Ending) -> None:
        """Post the measurement with its result; retries where that may help."""
        data = json.dumps({"info": ending.info, "result": ending.result}).encode()
        headers = {"Content-Type": "application/json", "User-Agent": "ray_probe"}
        for attempt in range(WEBHOOK_TRIES):
            try:
                request = urllib.request.Request(address, data, headers, method="POST")
                with urllib.request.urlopen(request, timeout=self._webhook_s):
                    return
            except urllib.error.HTTPError as error:
                error.close()
                if error.code < 500 or attempt == WEBHOOK_TRIES - 1:
                    raise RuntimeError(f"answered {error.code} {error.reason}") from None
            except OSError:
                if attempt == WEBHOOK_TRIES - 1:
                    raise


def _failure(what: str, call: Callable[[], None]) -> list[str]:
    """Return what failed in one text, or nothing.

    The address is not named: it may hold a secret.
    """
    try:
        call()
    except Exception as error:
        return [f"{what}: {first_line(error)}"]
    return []


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """Kill a program and what it started."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        process.kill()
