"""Hooks and method wrappers that stay with the model they were put on: a copy or a pickle of it has none of them."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

#: Replaces a hook in a copy or a pickle of its model: it takes any arguments and returns None. It is of the standard
#: library, so that a pickle can be loaded without AxisCap.
_NO_OP = contextlib.nullcontext().__exit__


class Hook:
    """A hook that is not copied or pickled with its model."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _NO_OP

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


class MethodWrapper:
    """Wraps a method of one object, with its signature, which transformers inspects.

    Parameters
    ----------
    call
        is called with the original method and its arguments.
    """

    def __init__(self, owner: Any, name: str, call: Callable[..., Any]) -> None:
        self.owner, self.name, self.call = owner, name, call
        #: What the owner's own attributes had under the name; None if the method comes from its class.
        self.replaced = owner.__dict__.get(name)
        self.original = getattr(owner, name)
        functools.update_wrapper(self, self.original)
        owner.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.original, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.replaced is not None:
            return copy.deepcopy(self.replaced, memo)
        return getattr(type(self.owner), self.name).__get__(memo.get(id(self.owner), self.owner))

    def __reduce__(self) -> tuple[Any, ...]:
        return (copy.copy, (self.replaced,)) if self.replaced is not None else (getattr, (self.owner, self.name))

    def undo(self) -> None:
        """Restores the method. A wrapper that somebody else wrapped stays, and passes its arguments on."""
        self.call = lambda original, *args, **kwargs: original(*args, **kwargs)
        if self.owner.__dict__.get(self.name) is not self:
            return
        if self.replaced is None:
            del self.owner.__dict__[self.name]
        else:
            self.owner.__dict__[self.name] = self.replaced
