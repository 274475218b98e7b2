"""Capping inside transformers: hooks on the decoder layers of a model in this process."""

from axiscap.transformers.installation import Installation, install, installed

__all__ = ["Installation", "install", "installed"]
