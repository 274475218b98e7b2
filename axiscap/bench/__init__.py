"""The measurements of ``axiscap bench``: the kernels alone, and capped layers inside the decoding of a real model."""

from axiscap.bench.decoding import measure_decode, measure_layer
from axiscap.bench.kernels import Case, NormCase, measure_case, published
from axiscap.bench.run import check_cuda, measure

__all__ = [
    "Case",
    "NormCase",
    "check_cuda",
    "measure",
    "measure_case",
    "measure_decode",
    "measure_layer",
    "published",
]
