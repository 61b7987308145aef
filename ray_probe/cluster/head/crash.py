"""Finds the line that says why a process ended, also in a crash dump."""

import re
from collections.abc import Sequence

_PREFIX = re.compile(r"^(?:\[[^\]]* [A-Z] \d+ \d+\] [\w.]+:\d+: *|[A-Z]\d{4} [\d:.]+ +\d+ [\w.]+:\d+\] +)")
"""What Ray and gRPC write before a message: `[TIME E PID TID] FILE:LINE: ` and `E1128 TIME TID FILE:LINE] `."""
_WRAPPER = re.compile(r"^.*?(?:what\(\): |Check failed: )")
_FRAME = re.compile(r"(?:^|\s+)\S*\([^\s()]*\+0x[0-9a-f]+\) \[0x[0-9a-f]+\].*$")
_DUMP = re.compile(
    r"^(?:\*\*\* StackTrace|PC: @|@ |\[failure_signal_handler|Stack trace|Stack \(most recent|(?:Current t|T)hread 0x|"
    r"Extension modules:|File \")"
)
_SIGNAL = re.compile(r"^(?:\*\*\* SIG|Fatal Python error:)")
_TELLING = re.compile(r"error|failed|denied|exception|refused|cannot|unable|illegal|invalid|no such", re.IGNORECASE)
_TRACEBACK = "Traceback (most recent call last):"


def telling_line(words: str) -> str | None:
    """Returns the line that says why a process ended, or None.

    In a crash dump at the end this is the first message that names a fault, in a Python traceback the exception.

    Args:
        words: output of the process.
    """
    lines = words.splitlines()
    dump = crash_dump(lines)
    if not dump and _TRACEBACK in words:
        after = lines[max(place for place, line in enumerate(lines) if line.strip() == _TRACEBACK) + 1 :]
        exception = next((line.strip() for line in after if line.strip() and not line[0].isspace()), None)
        if exception is not None:
            return exception
    messages = [message for line in dump or lines if (message := _message(line))]
    return next((line for line in messages if _TELLING.search(line)), messages[0] if messages else None)


def crash_dump(lines: Sequence[str]) -> Sequence[str]:
    """Returns a crash dump at the end of the lines, with one line before it; or []."""
    start = len(lines)
    while start and (_is_of_dump(lines[start - 1]) or not lines[start - 1].strip()):
        start -= 1
    dump = lines[start:]
    return lines[max(0, start - 1) :] if any(_is_of_dump(line) for line in dump) else []


def _is_of_dump(line: str) -> bool:
    text = _PREFIX.sub("", line.strip())
    return bool(_FRAME.search(text) or _DUMP.match(text) or _SIGNAL.match(text))


def _message(line: str) -> str:
    """Returns a line without time, place and stack frame; "" for a line of the dump."""
    text = _FRAME.sub("", _WRAPPER.sub("", _PREFIX.sub("", line.strip()))).strip()
    return "" if _DUMP.match(text) else text
