"""Names of the classes that a description can be rebuilt from: those of the package and those that others register."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

__all__ = ["Registry", "plain"]

T = TypeVar("T")


class Registry(Generic[T]):
    """The classes of one kind by name.

    Args:
        kind: what the classes are, as messages call it: `"factorization"`.
        register: the function that adds one, as messages call it: `"register_factorization"`.
    """

    def __init__(self, kind: str, register: str) -> None:
        self.kind = kind
        self._register = register
        self._classes: dict[str, type[T]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __getitem__(self, name: str) -> type[T]:
        """The class called `name`.

        Raises:
            ValueError: no class has that name; the message lists the known ones.
        """
        if name not in self._classes:
            raise ValueError(
                f"{self.kind} {name!r} is unknown; the known ones are {', '.join(sorted(self._classes))}, and "
                f"{self._register} adds others"
            )
        return self._classes[name]

    def add(self, cls: type[T], base: type[T], name: str | None = None) -> None:
        """Register `cls`, a subclass of `base`, as `name`, by default the name of the class. A class that is defined anew, as in a notebook, replaces itself.

        Raises:
            TypeError: `cls` is not a subclass of `base`, or `name` not a string.
            ValueError: the name belongs to another class.
        """
        if not isinstance(cls, type) or not issubclass(cls, base):
            raise TypeError(
                f"{self._register} takes a subclass of {base.__name__}, got {cls!r}"
                + ("" if isinstance(cls, type) else "; pass the class, not an instance")
            )
        name = cls.__name__ if name is None else name
        if not isinstance(name, str) or not name:
            raise TypeError(f"{self._register}: name={name!r} must be a string that is not empty")
        known = self._classes.get(name)
        if known is not None and _path(known) != _path(cls):
            raise ValueError(
                f"{self._register}: the name {name!r} belongs to {_path(known)}; register {_path(cls)} under another name"
            )
        self._classes[name] = cls

    def name_of(self, cls: type[T]) -> str:
        """The name that `cls` is registered under, or its own where it is not registered.

        Raises:
            ValueError: `cls` is not registered and its name belongs to another class.
        """
        for name, known in self._classes.items():
            if known is cls:
                return name
        if cls.__name__ in self._classes:
            raise ValueError(
                f"{_path(cls)} is not registered and has the name of the {self.kind} {_path(self._classes[cls.__name__])}; "
                f"register it under another name: {self._register}({cls.__name__}, name=...)"
            )
        return cls.__name__

    def read(self, data: Mapping[str, Any]) -> tuple[type[T], dict[str, Any]]:
        """The class that `data["type"]` names, and the other entries.

        Raises:
            TypeError: `data` is not a mapping.
            ValueError: `data` names no type, or an unknown one.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"a {self.kind} is rebuilt from what its to_dict() gives, got {data!r}")
        if "type" not in data:
            raise ValueError(
                f"the description {dict(data)!r} has no 'type'; pass what to_dict() of a {self.kind} gives"
            )
        return self[data["type"]], {key: value for key, value in data.items() if key != "type"}

    def check_settings(self, name: str, settings: Mapping[str, Any], known: Iterable[str]) -> None:
        """Raise ValueError where `settings` has an entry that is not among the `known` ones."""
        known = list(known)
        unknown = [setting for setting in settings if setting not in known]
        if unknown:
            raise ValueError(
                f"{self.kind} {name} has no setting {', '.join(unknown)}; its settings are {', '.join(known) or 'none'}"
            )


def plain(owner: object, name: str, value: Any) -> Any:
    """The setting `name` of `owner` as JSON data; shapes that are keys become `"768x8"`.

    Raises:
        TypeError: it holds something else.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [plain(owner, name, entry) for entry in value]
    if isinstance(value, Mapping) and all(isinstance(key, (str, tuple)) for key in value):
        return {
            key if isinstance(key, str) else "x".join(map(str, key)): plain(owner, name, entry)
            for key, entry in value.items()
        }
    raise TypeError(f"{name}={value!r} of {type(owner).__name__} is no JSON data; the class needs a to_dict of its own")


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
