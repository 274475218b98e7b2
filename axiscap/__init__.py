"""AxisCap: activation capping along the Assistant Axis (arXiv 2601.10387), as a production part.

``CapProfile`` holds the axis and the floors, ``install`` puts them into a transformers model, ``ops`` are the fused
kernels underneath, and ``reference`` is the same in plain torch.
"""

import torch  # the native module finds torch's libraries loaded

try:
    import axiscap._C  # noqa: F401
except ImportError as error:
    if torch.__version__ >= "2.10":
        raise
    raise ImportError(f"axiscap needs torch 2.10 or newer, and finds torch {torch.__version__} ({error})") from error

from axiscap import ops
from axiscap.ops.stats import LayerStats
from axiscap.profile import CapProfile, Evidence, ProfileError
from axiscap.transformers import Installation, install, installed

__version__ = "0.1.0"

__all__ = ["CapProfile", "Evidence", "Installation", "LayerStats", "ProfileError", "install", "installed", "ops"]
