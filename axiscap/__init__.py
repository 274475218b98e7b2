"""AxisCap: activation capping along the Assistant Axis (arXiv 2601.10387), as a production part.

``CapProfile`` holds the axis and the floors, ``install`` puts them into a transformers model, ``ops`` are the fused
kernels underneath, and ``reference`` is the same in plain torch.
"""

import torch  # noqa: F401  (the native module finds torch's libraries loaded)

try:
    import axiscap._C  # noqa: F401
except ImportError as error:
    from importlib.metadata import version
    from pathlib import Path

    built_for = Path(__file__).with_name("built_for.txt")
    built, found = built_for.read_text() if built_for.exists() else "", version("torch")
    if not built or built == found:
        raise
    raise ImportError(
        f"axiscap was built for torch {built}, and finds torch {found}: install it again, with --no-build-isolation "
        f"({error})"
    ) from error

from axiscap import ops
from axiscap.installation import Installation, install
from axiscap.profile import CapProfile, Evidence, ProfileError
from axiscap.stats import LayerStats

__version__ = "0.1.0"

__all__ = ["CapProfile", "Evidence", "Installation", "LayerStats", "ProfileError", "install", "ops"]
