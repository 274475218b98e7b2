"""Files of others: those published with the paper (arXiv 2601.10387), and control vectors for llama.cpp."""

from axiscap.interop.capping_config import experiments, read_capping_config, write_capping_config
from axiscap.interop.control_vectors import read_control_vector, write_control_vector
from axiscap.interop.vectors import Vectors, read_axis, read_vectors, write_axis, write_vectors

__all__ = [
    "Vectors",
    "experiments",
    "read_axis",
    "read_capping_config",
    "read_control_vector",
    "read_vectors",
    "write_axis",
    "write_capping_config",
    "write_control_vector",
    "write_vectors",
]
