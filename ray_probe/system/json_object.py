"""Frozen dataclasses that are JSON objects where they are written or read."""

import threading
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from pydantic import TypeAdapter


def _key(name: str) -> str:
    """Return the key of a field: `pass_` is written as `pass`."""
    return name.rstrip("_")


class JsonObject:
    """Base of frozen dataclasses with one key a field.

    Attributes:
        OMITTED: fields without a key where they are None.
    """

    OMITTED: ClassVar[frozenset[str]] = frozenset()
    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"use_attribute_docstrings": True, "alias_generator": _key}

    def to_json(self) -> dict[str, object]:
        """Return the object in plain JSON types."""
        return _plain_fields(self)

    @classmethod
    def from_json(cls, raw: object) -> Self:
        """Read what `to_json` returned; unknown keys are ignored.

        A field without a key takes its default.

        Raises:
            ValueError: one line that names the first key that is missing or has another type.
        """
        from pydantic import ValidationError

        try:
            found: Self = _adapter(cls).validate_python(raw)
            return found
        except ValidationError as error:
            first = error.errors()[0]
            path, problem = [str(key) for key in first["loc"]], first["msg"]
            if first["type"] == "missing":
                problem = f"has no {path.pop()!r}"
            raise ValueError(": ".join(filter(None, (".".join(path), problem)))) from None


_ADAPTERS: "dict[type[Any], TypeAdapter[Any]]" = {}
# For the docstrings of fields pydantic parses source with `ast`, which CPython 3.11 does not survive in two threads at
# once (SystemError: AST constructor recursion depth mismatch). A controller answers queries in several.
_BUILDING = threading.Lock()


def _adapter(kind: type[Any]) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter  # here, because the fitter's process imports no pydantic

    with _BUILDING:
        if kind not in _ADAPTERS:
            _ADAPTERS[kind] = TypeAdapter(kind)
        return _ADAPTERS[kind]


def _plain_fields(value: Any) -> dict[str, object]:
    found = {field.name: getattr(value, field.name) for field in fields(value)}
    omitted = getattr(value, "OMITTED", ())
    return {_key(name): _plain(item) for name, item in found.items() if item is not None or name not in omitted}


def _plain(value: object) -> object:
    if is_dataclass(value):
        return _plain_fields(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def json_schema(kind: type[JsonObject]) -> dict[str, object]:
    """Return the JSON schema of what `to_json` writes."""
    schema = _adapter(kind).json_schema(mode="serialization")
    for part in (schema, *schema.get("$defs", {}).values()):
        for figure in part["properties"].values():
            for noise in ("title", "default"):  # every key is written, whatever its value
                figure.pop(noise, None)
        part["required"] = [name for name in part["properties"] if name not in kind.OMITTED]
    return schema
