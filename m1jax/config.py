"""Nested plain values become frozen dataclasses, once, at the border; every mistake is one line that names the key.

    loss = build(LossConfig, {"weight_cap": 5})       # the int becomes the float that the field asks for
    build(LossConfig, {"wieght_cap": 5})              # UserError: config.wieght_cap: unknown key; did you mean ...

The dataclass is the schema: annotations give the types, field defaults the defaults, `__post_init__` the rules.
This file knows no section of any config, no flags, no ml_collections and no jax.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from m1jax.errors import UserError

T = TypeVar("T")


def named_function(name: str, field: str) -> Callable[..., Any]:
    """The function that "module:function" names, for a field of a config that takes one.

    Raises:
        ValueError: there is none; the message starts with the field.
    """
    module, colon, function = name.partition(":")
    try:
        if not (module and colon and function):
            raise ImportError("it is not of the form module:function")
        found = getattr(importlib.import_module(module), function)
        if not callable(found):
            raise ImportError("it is no function")
        return found
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # TypeError: a relative name
        raise ValueError(f"{field}: cannot load {name!r} ({error}); write module:function") from error


DERIVED = {"derived": True}
"""Metadata of a field that another part of the config sets: no key of a file, and not written to one."""

MISSING = "(absent)"
"""What `changed_keys` reports for the side that lacks a key."""


def build(cls: type[T], values: Mapping[str, Any], path: str = "config") -> T:
    """A frozen dataclass from a nested mapping.

    Args:
        cls: the dataclass; nested dataclasses, tuples, Optional, Literal, dict and plain scalars are understood.
        values: keys are field names. Missing keys take the field's default.
        path: dotted name of `values`, for messages.

    Returns:
        An instance of `cls`; ints given for float fields are floats, lists are tuples.

    Raises:
        UserError: unknown key (with the nearest valid one), missing key, wrong type, or a rule of the dataclass
            itself; the message starts with the dotted key.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{path}: expected a section with keys, found {_show(values)}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.metadata != DERIVED}  # pyright: ignore[reportArgumentType]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            mend = f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(sorted(fields))}"
            raise UserError(f"{path}.{key}: unknown key; {mend}")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], f"{path}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{path}.{name}: missing; it has no default")
    try:
        return cls(**arguments)
    except ValueError as error:
        raise UserError(_prefixed(str(error), path, fields)) from error


def to_dict(value: Any) -> Any:
    """Plain JSON values of a dataclass (or of a tree of dataclasses, mappings and sequences); tuples become lists."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value) if f.metadata != DERIVED}
    if isinstance(value, Mapping):
        return {str(key): to_dict(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_dict(item) for item in value]
    return value


def changed_keys(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """`(dotted key, old value, new value)` for every leaf that differs, in the order of the keys.

    Args:
        old, new: plain values or dataclasses, compared as `to_dict` shows them. A key on one side only is reported
            with `MISSING` on the other.
        path: dotted name of both.
    """
    old, new = to_dict(old), to_dict(new)
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(old) + [key for key in new if key not in old]
        return [
            change
            for key in keys
            for change in changed_keys(old.get(key, MISSING), new.get(key, MISSING), f"{path}.{key}" if path else key)
        ]
    # True == 1 in Python, but not in a config.
    return [] if old == new and isinstance(old, bool) == isinstance(new, bool) else [(path, old, new)]


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as the annotation `hint` asks for it, or a UserError that names the key, the value and the type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, path)
    if origin is Literal:
        if value in arguments:
            return value
        raise UserError(f"{path}: {_show(value)} is not one of {', '.join(map(str, arguments))}")
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, path)  # pyright: ignore
    if hint is tuple or origin is tuple:
        return _convert_tuple(arguments, value, path)
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong_type(path, value, "a mapping")
        inner = arguments[1] if arguments else Any
        return {str(key): _convert(inner, item, f"{path}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # bool is a subclass of int; a count of True is a mistake.
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise _wrong_type(path, value, _name(hint))
    return value


def _convert_union(options: tuple[Any, ...], value: Any, path: str) -> Any:
    """The first option that takes the value; with one real option besides None, its own message is the error."""
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    exact = [option for option in options if isinstance(option, type) and type(value) is option]
    for option in exact or options:
        try:
            return _convert(option, value, path)
        except UserError:
            if len(options) == 1:
                raise
    raise _wrong_type(path, value, " or ".join(map(_name, options)))


def _convert_tuple(items: tuple[Any, ...], value: Any, path: str) -> tuple:
    """A tuple of one item type (`tuple[X, ...]`) or of a fixed length (`tuple[X, Y]`)."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _wrong_type(path, value, "a tuple")
    if not items:
        return tuple(value)
    if items[-1] is Ellipsis:
        items = (items[0],) * len(value)
    if len(items) != len(value):
        raise UserError(f"{path}: expected {len(items)} values, found {len(value)}: {_show(value)}")
    return tuple(
        _convert(item, entry, f"{path}[{i}]") for i, (item, entry) in enumerate(zip(items, value, strict=True))
    )


def _prefixed(message: str, path: str, fields: Mapping[str, Any]) -> str:
    """A dataclass's own complaint under its dotted path: "weight_cap: ..." as "config.loss.weight_cap: ..."."""
    head = message.split(":", 1)[0].split(".", 1)[0].split("[", 1)[0]
    return f"{path}.{message}" if head in fields and head != message else f"{path}: {message}"


def _wrong_type(path: str, value: Any, expected: str) -> UserError:
    return UserError(f"{path}: expected {expected}, found {_show(value)}")


def _show(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
