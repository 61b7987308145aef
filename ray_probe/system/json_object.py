"""Frozen dataclasses that are JSON objects where they are written or read."""

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

    def to_json(self) -> dict[str, Any]:
        """Return the object in plain JSON types."""
        return _plain_fields(self)

    @classmethod
    def from_json(cls, raw: object) -> Self:
        """Read what `to_json` returned; a field without a key takes its default, and unknown keys are ignored.

        Raises:
            ValueError: one line that names the first key that is missing or has another type.
        """
        from pydantic import ValidationError

        try:
            found: Self = _adapter(cls).validate_python(raw)
            return found
        except ValidationError as error:
            first = error.errors()[0]
            *path, last = first["loc"] or ("",)
            where = ".".join(map(str, path))
            if first["type"] == "missing":
                raise ValueError(f"{where}: has no {last!r}" if where else f"has no {last!r}") from None
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


_ADAPTERS: "dict[type[Any], TypeAdapter[Any]]" = {}


def _adapter(kind: type[Any]) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter  # here, because the fitter's process imports no pydantic

    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def _plain_fields(value: Any) -> dict[str, Any]:
    found = {field.name: getattr(value, field.name) for field in fields(value)}
    omitted = getattr(value, "OMITTED", ())
    return {_key(name): _plain(item) for name, item in found.items() if item is not None or name not in omitted}


def _plain(value: object) -> object:
    if is_dataclass(value):
        return _plain_fields(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def json_schema(kind: type[JsonObject]) -> dict[str, Any]:
    """Return the JSON schema of what `to_json` writes: every key is required but those that may be omitted."""
    schema: dict[str, Any] = _adapter(kind).json_schema(mode="serialization")
    for part in (schema, *schema.get("$defs", {}).values()):
        part["required"] = [name for name in part["properties"] if name not in kind.OMITTED]
    return schema
