"""The profile: what a user saves, shares and installs. One safetensors file; loading never unpickles."""

from axiscap.profile.checks import MAX_DIRECTIONS, MAX_LAYERS, ProfileError, format_layers
from axiscap.profile.evidence import Evidence
from axiscap.profile.file import CONVERTED, MAX_FILE_BYTES, check_file, check_target, make_folder
from axiscap.profile.record import CapProfile
from axiscap.profile.slot import Slot, target_gaps
from axiscap.profile.source import is_url

__all__ = [
    "CONVERTED",
    "MAX_DIRECTIONS",
    "MAX_FILE_BYTES",
    "MAX_LAYERS",
    "CapProfile",
    "Evidence",
    "ProfileError",
    "Slot",
    "check_file",
    "check_target",
    "format_layers",
    "is_url",
    "make_folder",
    "target_gaps",
]
