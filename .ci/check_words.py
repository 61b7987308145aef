"""Report words that the project's plain English avoids, and first lines of docstrings past 80 characters."""

import ast
import re
import sys
from pathlib import Path

AVOID = {
    r"[Ss]o many|[Ss]o much": "name the number",
    r"(?:is|are|was|were|been) told|[Tt]old (?:with|of|to|at|since|in|as|by|that|when|where)": "reported, passed",
    r"at hand": "available, loaded",
    r"(?:is|are|was|were) none": "does not exist, is invalid",
    r"(?:[Dd]one|[Mm]ade|[Ff]ound|[Bb]egun|[Aa]sked) (?:again|anew)": "repeated, restarted, recomputed, retried",
    r"[Ll]et go of": "released",
    r"[Ww]hoever|[Ww]hatever (?:is|was)": "name the subject",
    r"[Ss]tands? still": "hangs",
    r"of before|in its hand|in hand": "earlier, assigned",
    r"[Ss]pec(?:ification)? sections?|sections? \d": "link to a page of docs/",
}
PATTERNS = [(re.compile(rf"\b(?:{pattern})\b"), remedy) for pattern, remedy in AVOID.items()]


def findings(path: Path) -> list[str]:
    """List the lines of `path` with a word to avoid or a long first line of a docstring."""
    text = path.read_text(encoding="utf-8")
    numbered = [*enumerate(text.splitlines(), 1)]
    found = [(n, f"'{m.group()}': {remedy}") for n, line in numbered for p, remedy in PATTERNS if (m := p.search(line))]
    for node in ast.walk(ast.parse(text)) if path.suffix == ".py" else ():
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
        if documented and len(first := documented.splitlines()[0]) > 80:
            found.append((getattr(node, "lineno", 1), f"docstring begins with {len(first)} characters, of at most 80"))
    return [f"{path}:{number}: {what}" for number, what in found]


if __name__ == "__main__":
    roots = [Path(root) for root in sys.argv[1:]]
    files = [file for root in roots for file in ([root] if root.is_file() else sorted(root.rglob("*.[pm][yd]")))]
    lines = [line for file in files for line in findings(file)]
    sys.exit("\n".join(lines) or None)
