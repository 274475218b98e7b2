"""How a method of an engine is wrapped, and how AxisCap's key is recognised. The standard library is enough for both.

An engine's own hook registry does not do for the first: SGLang's logs a hook that fails, and serves uncapped. A wrapped
method that fails stops its process.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from typing import Any

KEY = "axiscap"


def is_nearly(key: object) -> bool:
    """Whether a key is the one of AxisCap, in whatever spelling."""
    return re.sub(r"[\W_]", "", str(key)).casefold() == KEY


def wrap_in(module: str, cls: str, method: str, wrapper: Callable[..., Any]) -> bool:
    """Replaces a method by ``wrapper(original, self, ...)``, once; where the module is not loaded, this is no process
    that needs it. Returns whether nothing is amiss.
    """
    if module not in sys.modules:
        return True
    owner = getattr(sys.modules[module], cls, None)
    if not hasattr(owner, method):
        return False
    wrap(owner, method, wrapper)
    return True


def wrap(owner: Any, method: str, wrapper: Callable[..., Any]) -> None:
    """The same, of a class or of one object."""
    original = getattr(owner, method)
    if getattr(original, "_axiscap", None) is wrapper:
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped._axiscap = wrapper  # type: ignore[attr-defined]
    setattr(owner, method, wrapped)
