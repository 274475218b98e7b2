"""Stands in for torchvision in the environment of SGLang's tests: it is imported there and, for texts, never used.

Its wheels are built for CUDA and do not load beside a torch for CPUs.
"""

from _stub import stand_in

__version__ = "0"

stand_in(__name__)
