"""Stands in for SGLang's CUDA kernels, which it imports on a CPU as well, and does not call with its torch backends."""

from _stub import stand_in

__version__ = "0"

stand_in(__name__)
