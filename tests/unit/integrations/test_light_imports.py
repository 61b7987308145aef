"""A hook loads in any trainer's environment: it imports the standard library alone."""

import subprocess
import sys
from pathlib import Path

import pytest

import ray_probe

PACKAGE = Path(ray_probe.__file__).parent
HOOKS = ["ray_probe.integrations", *(f"ray_probe.integrations.{path.stem}" for path in
         sorted((PACKAGE / "integrations").glob("*.py")) if path.stem != "__init__")]  # fmt: skip


@pytest.mark.parametrize("modules", [["ray_probe"], HOOKS], ids=["the package", "its hooks"])
def test_only_the_standard_library_is_imported(modules: list[str]) -> None:
    # -S leaves out what the environment itself imports at start; -c needs the package's directory instead.
    code = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); import {', '.join(modules)}"
    code += "; print(' '.join({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) - sys.stdlib_module_names - {"__main__"} == {"ray_probe"}


def test_every_hook_is_there() -> None:
    assert {"callback", "skyrl", "spool", "verl"} <= {name.rpartition(".")[2] for name in HOOKS}
