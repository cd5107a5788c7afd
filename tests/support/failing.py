"""Operations of torch that fail, each in its turn."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

#: Make no memory and change none.
_VIEWS = ("view", "detach", "t", "slice", "select", "expand", "unsqueeze", "reshape", "alias")


class FailingOperation(TorchDispatchMode):
    """While it is on, one operation that allocates or writes raises before it is done.

    Of an operation on many tensors, half are done.

    Args:
        number: how many such operations are done before, from 0.
        error: what is raised.
        lasting: whether all later ones that allocate raise as well, as where memory is short.

    Attributes:
        failed: whether one has raised.
    """

    def __init__(self, number: int, error: BaseException, *, lasting: bool = False) -> None:
        super().__init__()
        self.failed = False
        self._left = number
        self._error = error
        self._lasting = lasting

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """One operation."""
        name = func._schema.name.partition("::")[2]
        if name not in _VIEWS and self._is_due(writes=func._schema.is_mutable):
            self.failed = True
            if name.startswith("_foreach"):
                func(*(each[: len(each) // 2] for each in args), **(kwargs or {}))
            raise self._error
        return func(*args, **(kwargs or {}))

    def _is_due(self, *, writes: bool) -> bool:
        if self.failed:
            return self._lasting and not writes
        self._left -= 1
        return self._left < 0
