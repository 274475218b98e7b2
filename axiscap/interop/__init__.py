"""Files of others: those published with the paper (arXiv 2601.10387), and control vectors for llama.cpp."""

from axiscap.interop.published import (
    Vectors,
    experiments,
    read_axis,
    read_capping_config,
    read_control_vector,
    read_vectors,
    write_axis,
    write_capping_config,
    write_control_vector,
    write_vectors,
)

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
