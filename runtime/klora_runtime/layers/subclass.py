"""Overlays: change the behaviour of one object by a subclass of its class, under the same name.

The object's ``__dict__``, and the class that other objects share, stay untouched. Several overlays
may be on one object; the outermost can be taken off, and any of them can be retired. This is the
only way in which klora changes a leaf (`leaf`), a scheduler or a pipeline instance.

Other libraries compare classes and patch them. So an overlay class equals the class beneath it
(``type(a) == Plain``), and calls that class's present methods (:func:`inherited`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

_OVERLAY = "_klora_overlay"

#: Sets the class of an object, even if the object overrides ``__class__``.
_set_class: Callable[[Any, type], None] = vars(object)["__class__"].__set__


class Overlay:
    """The subclasses that one owner puts over the classes of objects.

    Args:
        make: class of an object -> attributes of the class over it. It is called once per class,
            so objects of one class share the class over it.
        passes: whether an object poses as one of its plain class: ``thing.__class__`` is then the
            plain class, and ``type(thing)(...)`` makes a plain object. Such an object needs its own
            methods for copying, because Python copies by ``type(thing).__new__``.

    Attributes:
        active: whether the overlay acts; False once it is retired.
    """

    def __init__(self, make: Callable[[type], dict[str, Any]], *, passes: bool = True) -> None:
        self.active = True
        self._make = make
        self._passes = passes
        self._classes: dict[int, type] = {}  # by the id of the class beneath, which each holds

    def put_on(self, thing: Any) -> None:
        """Give ``thing`` a class of this overlay; a second call does nothing."""
        if self.is_on(thing):
            return
        plain = type(thing)
        if id(plain) not in self._classes:
            self._classes[id(plain)] = self._class_over(plain)
        _set_class(thing, self._classes[id(plain)])

    def is_on(self, thing: Any) -> bool:
        """Return whether this overlay is on ``thing``, or was on the original of this copy."""
        return self.beneath(thing) is not None

    def beneath(self, thing: Any) -> type | None:
        """Return the class beneath this overlay; None if the overlay is not on ``thing``."""
        found = (cls.__bases__[0] for cls in type(thing).__mro__ if _overlay(cls) is self)
        return next(found, None)

    def is_outermost(self, thing: Any) -> bool:
        """Return whether the class of ``thing`` is this overlay's, so nothing changed it since."""
        return _overlay(type(thing)) is self

    def take_off(self, thing: Any) -> None:
        """Give ``thing`` its former class back if this overlay is the outermost one."""
        if self.is_outermost(thing):
            _set_class(thing, type(thing).__bases__[0])
            _uncover(thing)

    def retire(self, things: Iterable[Any]) -> None:
        """Stop for good, and give these objects their former classes back.

        Beneath another overlay, the class stays until that overlay goes.
        """
        self.active = False
        for thing in things:
            _uncover(thing)

    def _class_over(self, plain: Any) -> type:
        def new(_: type, *args: Any, **kwargs: Any) -> Any:
            """Make a plain object for ``type(thing)(...)``."""
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
    """Return a function that calls a class's present method; None if there is no such method.

    Other code may replace the method on the class at any time, and restore it.
    """
    found = _attribute(plain, name)
    if not callable(found):
        return None

    @functools.wraps(found)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _attribute(plain, name).__get__(self, type(self))(*args, **kwargs)

    return method


def plain_twin(thing: Any, plain: type) -> Any:
    """Return an object of class ``plain`` that shares its attributes with ``thing``."""
    twin: Any = object.__new__(plain)
    vars(twin).update(vars(thing))
    return twin


def plain_class(cls: type) -> type:
    """Return the class beneath all overlays; the class itself if there are none."""
    while _overlay(cls) is not None:
        cls = cls.__bases__[0]
    return cls


def _overlay(cls: type) -> Overlay | None:
    return vars(cls).get(_OVERLAY)


def _plain_class(thing: Any) -> type:
    return plain_class(type(thing))


def _cover(thing: Any, cls: type) -> None:
    """Give ``thing`` another class beneath its overlays; runs when code assigns ``__class__``."""
    overlays = [found for each in type(thing).__mro__ if (found := _overlay(each)) is not None]
    _set_class(thing, cls)
    for overlay in reversed(overlays):
        if overlay.active:
            overlay.put_on(thing)


@functools.cache
def _equal_to_plain(kind: type) -> Any:
    """Return a metaclass whose classes are equal to the class that they are over.

    Args:
        kind: the metaclass of the classes beneath.
    """

    class EqualToPlain(kind):  # type: ignore[misc]
        def __eq__(self, other: object) -> bool:
            return isinstance(other, type) and plain_class(self) is plain_class(other)

        def __hash__(self) -> int:
            return hash(plain_class(self))

    return EqualToPlain


def _attribute(cls: type, name: str) -> Any:
    """Return a class's own or inherited attribute, but not its metaclass's, such as call."""
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)


def _uncover(thing: Any) -> None:
    """Take retired overlays off ``thing``, from the outermost to the first active one."""
    while (overlay := _overlay(type(thing))) is not None and not overlay.active:
        _set_class(thing, type(thing).__bases__[0])
