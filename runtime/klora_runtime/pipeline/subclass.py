"""Changing what one object does, and nothing else: a class of its own under the same name.

The object's ``__class__`` becomes a subclass of what it was. Its ``__dict__`` and the class that
other objects share stay untouched; what is made from its class (``type(thing)(...)``,
``thing.from_config(...)``) is of the class that it was. Several such classes may lie on one object
and be taken off in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_OVERLAY = "_klora_overlay"


class Overlay:
    """What one owner puts over the classes of objects.

    Args:
        make: the class an object has -> the attributes of its own class.
    """

    def __init__(self, make: Callable[[type], dict[str, Any]]) -> None:
        self.active = True
        self._make = make

    def put_on(self, thing: Any) -> None:
        """Give ``thing`` its own class; twice is once."""
        if self.is_on(thing):
            return
        plain: Any = type(thing)

        def new(_: type, *args: Any, **kwargs: Any) -> Any:
            """``type(thing)(...)`` makes a thing of its own, over which nothing lies."""
            return plain(*args, **kwargs)

        thing.__class__ = type(
            plain.__name__,
            (plain,),
            {
                "__module__": plain.__module__,
                "__qualname__": plain.__qualname__,
                "__doc__": plain.__doc__,
                "__new__": new,
                _OVERLAY: self,
                **self._make(plain),
            },
        )

    def is_on(self, thing: Any) -> bool:
        """Whether ``thing``, or what it is a copy of, was given a class by this owner."""
        return any(vars(cls).get(_OVERLAY) is self for cls in type(thing).__mro__)


def plain_twin(thing: Any, plain: type) -> Any:
    """An object of class ``plain`` that shares its attributes with ``thing``."""
    twin: Any = object.__new__(plain)
    vars(twin).update(vars(thing))
    return twin


def take_off(thing: Any) -> None:
    """Give ``thing`` back the class it had before overlays that are no longer active.

    An overlay under one that is still active stays until that one goes.
    """
    while (overlay := vars(type(thing)).get(_OVERLAY)) is not None and not overlay.active:
        thing.__class__ = type(thing).__bases__[0]
