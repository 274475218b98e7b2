"""The profile: what a user saves, shares and installs. One safetensors file; loading never unpickles."""

from axiscap.profile.record import (
    CONVERTED,
    MAX_DIRECTIONS,
    MAX_FILE_BYTES,
    MAX_LAYERS,
    CapProfile,
    Evidence,
    ProfileError,
    Slot,
    check_file,
    gaps,
    is_url,
    ranges,
)

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
    "gaps",
    "is_url",
    "ranges",
]
