"""Finds, in what a process wrote before it ended, the line that says why; a crash dump ends with stack frames."""

import re

_PREFIX = re.compile(r"^(?:\[[^\]]* [A-Z] \d+ \d+\] [\w.]+:\d+: +|[A-Z]\d{4} [\d:.]+ +\d+ [\w.]+:\d+\] +)")
"""What Ray and gRPC write before a message: `[TIME E PID TID] FILE:LINE: ` and `E1128 TIME TID FILE:LINE] `."""
_WRAPPER = re.compile(r"^.*?(?:what\(\): |Check failed: )")
_FRAME = re.compile(r"(?:^|\s+)\S*\([^\s()]*\+0x[0-9a-f]+\) \[0x[0-9a-f]+\].*$")
_DUMP = re.compile(
    r"^(?:\*\*\* StackTrace|PC: @|@ |\[failure_signal_handler|Stack trace|Stack \(most recent|(?:Current t|T)hread 0x|"
    r"Extension modules:|File \")"
)
_TELLING = re.compile(r"error|failed|denied|exception|refused|cannot|unable|illegal|invalid|no such", re.IGNORECASE)
_TRACEBACK = "Traceback (most recent call last):"


def telling_line(words: str) -> str | None:
    """The line of a process's last words that says why it ended; None without any.

    Of a Python traceback that is its exception; of another crash dump the first message that tells of a fault.

    Args:
        words: what the process wrote to stderr.
    """
    lines = words.splitlines()
    if _TRACEBACK in words:
        after = lines[max(place for place, line in enumerate(lines) if line.strip() == _TRACEBACK) + 1 :]
        exception = next((line.strip() for line in after if line.strip() and not line[0].isspace()), None)
        if exception is not None:
            return exception
    messages = [message for line in lines if (message := _message(line))]
    return next((line for line in messages if _TELLING.search(line)), messages[0] if messages else None)


def is_dump(words: str) -> bool:
    """Whether stack frames of a crash are among the lines."""
    return any(_FRAME.search(line) or _DUMP.match(line.strip()) for line in words.splitlines())


def _message(line: str) -> str:
    """What a line says beside time, place and stack frame; empty for a line of the dump itself."""
    text = _FRAME.sub("", _WRAPPER.sub("", _PREFIX.sub("", line.strip()))).strip()
    return "" if _DUMP.match(text) else text
