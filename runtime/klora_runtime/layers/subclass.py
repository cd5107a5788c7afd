"""Changing what one object does, and nothing else: a class of its own under the same name.

The object's class becomes a subclass of what it was. Its ``__dict__`` and the class that other
objects share stay untouched. Several such classes may lie on one object, and each can be taken off
in its turn or retired in any order. This is the one way in which klora changes a leaf (`leaf`), a
scheduler or a pipeline instance.

Others ask for classes and change them. So a class over another equals it (``type(a) == Plain``),
and passes its calls on to what the other does at that moment (:func:`inherited`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

_OVERLAY = "_klora_overlay"

#: Sets the class of an object, whatever it says of its own ``__class__``.
_set_class: Callable[[Any, type], None] = vars(object)["__class__"].__set__


class Overlay:
    """What one owner puts over the classes of objects.

    Args:
        make: the class an object has -> the attributes of the class over it; asked once for each
            class, so that objects of one class share one over it.
        passes: whether a thing is to pass for one of its plain class with those who would change
            that class: ``thing.__class__`` is then the plain one, and ``type(thing)(...)`` makes a
            thing that nothing lies over. It then needs methods of its own to be copied: Python
            copies by ``type(thing).__new__``.

    Attributes:
        active: until it is retired.
    """

    def __init__(self, make: Callable[[type], dict[str, Any]], *, passes: bool = True) -> None:
        self.active = True
        self._make = make
        self._passes = passes
        self._classes: dict[int, type] = {}  # by the id of the one beneath, which each holds

    def put_on(self, thing: Any) -> None:
        """Give ``thing`` a class of this overlay; twice is once."""
        if self.is_on(thing):
            return
        plain = type(thing)
        if id(plain) not in self._classes:
            self._classes[id(plain)] = self._class_over(plain)
        _set_class(thing, self._classes[id(plain)])

    def is_on(self, thing: Any) -> bool:
        """Whether ``thing``, or what it is a copy of, was given a class by this overlay."""
        return self.beneath(thing) is not None

    def beneath(self, thing: Any) -> type | None:
        """The class that this overlay lies over; None where it is not on ``thing``."""
        found = (cls.__bases__[0] for cls in type(thing).__mro__ if _overlay(cls) is self)
        return next(found, None)

    def is_outermost(self, thing: Any) -> bool:
        """Whether it was given one, and nothing has changed its class since."""
        return _overlay(type(thing)) is self

    def take_off(self, thing: Any) -> None:
        """Give ``thing`` back the class it had, where this overlay is the outermost on it."""
        if self.is_outermost(thing):
            _set_class(thing, type(thing).__bases__[0])
            _uncover(thing)

    def retire(self, things: Iterable[Any]) -> None:
        """Stop for good, and give these things back the class they had.

        Where another overlay lies over it, the class stays until that one goes.
        """
        self.active = False
        for thing in things:
            _uncover(thing)

    def _class_over(self, plain: Any) -> type:
        def new(_: type, *args: Any, **kwargs: Any) -> Any:
            """``type(thing)(...)`` makes a thing of its own, over which nothing lies."""
            return plain(*args, **kwargs)

        passing = {"__new__": new, "__class__": property(_plain_class, _cover)}
        metaclass: Any = type(plain)
        made: type = _equal_to_plain(metaclass)(
            plain.__name__,
            (plain,),
            {
                "__module__": plain.__module__,
                "__qualname__": plain.__qualname__,
                "__doc__": plain.__doc__,
                **(passing if self._passes else {}),
                _OVERLAY: self,
                **self._make(plain),
            },
        )
        return made


def inherited(plain: type, name: str) -> Callable[..., Any] | None:
    """A method of a class as it is whenever it is called; None where there is none.

    Others may replace it on the class and give it back, before and after a class is put over it.
    """
    found = _attribute(plain, name)
    if not callable(found):
        return None

    @functools.wraps(found)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _attribute(plain, name).__get__(self, type(self))(*args, **kwargs)

    return method


def plain_twin(thing: Any, plain: type) -> Any:
    """An object of class ``plain`` that shares its attributes with ``thing``."""
    twin: Any = object.__new__(plain)
    vars(twin).update(vars(thing))
    return twin


def plain_class(cls: type) -> type:
    """The class that all overlays of a class lie over; the class itself without any."""
    while _overlay(cls) is not None:
        cls = cls.__bases__[0]
    return cls


def _overlay(cls: type) -> Overlay | None:
    return vars(cls).get(_OVERLAY)


def _plain_class(thing: Any) -> type:
    return plain_class(type(thing))


def _cover(thing: Any, cls: type) -> None:
    """Somebody gives ``thing`` another class: what lies over the present one lies over that."""
    overlays = [found for each in type(thing).__mro__ if (found := _overlay(each)) is not None]
    _set_class(thing, cls)
    for overlay in reversed(overlays):
        if overlay.active:
            overlay.put_on(thing)


@functools.cache
def _equal_to_plain(kind: type) -> Any:
    """A class of classes, each equal to the one that it lies over.

    Args:
        kind: the class of the classes that they lie over.
    """

    class EqualToPlain(kind):  # type: ignore[misc]
        def __eq__(self, other: object) -> bool:
            return isinstance(other, type) and plain_class(self) is plain_class(other)

        def __hash__(self) -> int:
            return hash(plain_class(self))

    return EqualToPlain


def _attribute(cls: type, name: str) -> Any:
    """A class's own or inherited attribute, not its metaclass's (every class is callable)."""
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)


def _uncover(thing: Any) -> None:
    """Take retired overlays off ``thing``, from the outermost to the first that is active."""
    while (overlay := _overlay(type(thing))) is not None and not overlay.active:
        _set_class(thing, type(thing).__bases__[0])
