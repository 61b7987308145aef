"""Plain signs for a stream that cannot write ours, such as an ASCII terminal."""

import codecs

ENCODING_ERRORS = "ray_probe.plain_signs"
"""Name of an error handler for streams that replaces signs which an encoding lacks."""

PLAIN = {
    "±": "+-", "²": "^2", "…": "...", "•": "*", "\u00a0": " ",
    "─": "-", "━": "=", "│": "|", "┃": "|", "╭": "+", "╮": "+", "╰": "+", "╯": "+", "┌": "+", "┐": "+", "└": "+",
    "┘": "+", "├": "+", "┤": "+", "┏": "+", "┓": "+", "┗": "+", "┛": "+",
}  # fmt: skip


def spelled(text: str, encoding: str) -> str:
    """Replace each character that the encoding lacks by a plain sign or an escape."""
    return text.encode(encoding, ENCODING_ERRORS).decode(encoding)


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(PLAIN.get(sign) or _escaped(sign) for sign in missing), error.end


def _escaped(sign: str) -> str:
    return sign.encode("ascii", "backslashreplace").decode("ascii")


codecs.register_error(ENCODING_ERRORS, _replaced)
