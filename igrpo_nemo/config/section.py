"""The base of every config section, and the field types that sections share.

A section is a frozen pydantic model that rejects unknown keys. A field's description, which `igrpo
keys` prints, is the text of its `key(...)`, or the docstring under it where the line would be long.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_serializer
from pydantic_core.core_schema import SerializerFunctionWrapHandler

UNSET = -1
"""Stands for `null` in a derivable key until `derive` has filled it."""

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
"""A time limit: a day at most, since clocks overflow long before infinity."""
NonNegativeFloat = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
TopP = Annotated[float, Field(gt=0, le=1)]


def key(description: str, *default: Any) -> Any:
    """A field with its description, and its default where it has one."""
    return Field(*default, description=description)


def _unset_if_null(value: Any) -> Any:
    if isinstance(value, int) and value < 1:
        raise ValueError("should be null (derived) or at least 1")
    return UNSET if value is None else value


Derivable = Annotated[int, BeforeValidator(_unset_if_null)]
"""A positive number that may be null in a file; code that reads it always sees the derived one."""


class Section(BaseModel):
    """A config section: frozen, strict about types, closed against unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out optional keys that nobody set: NeMo-RL tells an absent key from a null one."""
        return {
            key: value
            for key, value in handler(self).items()
            if value is not None or key in self.model_fields_set
        }


class HostSection(Section, extra="allow"):
    """A section of NeMo-RL's. A key that it has since 0.7.0 may stand here too, and no other
    (`nemo_schema`); whether the installed NeMo-RL has it is asked where it starts."""


ABSENT = object()


def at(values: Any, path: str, otherwise: Any = None) -> Any:
    """What nested mappings hold under a dotted path; `otherwise` where they hold nothing."""
    for name in path.split("."):
        if not isinstance(values, Mapping) or name not in values:
            return otherwise
        values = values[name]
    return values


def shown(value: Any) -> str:
    """A value as an override writes it: `null`, `true`, `0.85`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
