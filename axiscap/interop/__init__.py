"""Files of others: those of the paper (arXiv 2601.10387), persona vectors, control vectors, and clamps."""

from axiscap.interop.capping_config import experiments, read_capping_config, write_capping_config
from axiscap.interop.clamps import read_clamps
from axiscap.interop.control_vectors import read_control_vector, write_control_vector
from axiscap.interop.sources import open_source, read_source
from axiscap.interop.vectors import Vectors, read_axis, read_pipeline, read_vectors, write_axis, write_vectors

__all__ = [
    "Vectors",
    "experiments",
    "open_source",
    "read_axis",
    "read_capping_config",
    "read_clamps",
    "read_control_vector",
    "read_pipeline",
    "read_source",
    "read_vectors",
    "write_axis",
    "write_capping_config",
    "write_control_vector",
    "write_vectors",
]
