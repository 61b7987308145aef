"""Plain signs for an output that cannot write ours: an ASCII terminal, a log of a batch system, a strange path."""

import codecs

ENCODING_ERRORS = "ray_probe.plain_signs"
"""Name of an error handler for streams: it replaces what an encoding cannot write, and loses nothing."""

PLAIN = {
    "±": "+-", "²": "^2", "…": "...", "•": "*", "\u00a0": " ",
    "─": "-", "━": "=", "│": "|", "┃": "|", "╭": "+", "╮": "+", "╰": "+", "╯": "+", "┌": "+", "┐": "+", "└": "+",
    "┘": "+", "├": "+", "┤": "+", "┏": "+", "┓": "+", "┗": "+", "┛": "+",
}  # fmt: skip


def spelled(text: str, encoding: str) -> str:
    """Replace each character that the encoding lacks: our signs by plain ones, all else by its escape."""
    return text.encode(encoding, ENCODING_ERRORS).decode(encoding)


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(PLAIN.get(sign) or _escaped(sign) for sign in missing), error.end


def _escaped(sign: str) -> str:
    return sign.encode("ascii", "backslashreplace").decode("ascii")


codecs.register_error(ENCODING_ERRORS, _replaced)
