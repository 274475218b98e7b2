"""The attention sinks of a profile, in sentences."""

from __future__ import annotations

from collections.abc import Mapping

from axiscap import CapProfile
from axiscap.profile import CONVERTED, format_layers

#: A larger share of rows near a layer's limit means that ordinary rows and attention sinks overlap.
OVERLAP = 0.001


def describe_sinks(profile: CapProfile) -> str:
    """The rule by which the cap leaves attention sinks alone, and the figures that support it."""
    if profile.norm_limits is None:
        return "no limit is known: every row below its floor is lifted"
    limits = _at_capped_layers(profile, "limit_ratio")
    if not limits:
        return f"left alone beyond a norm of {_span(profile.norm_limits.tolist())}"
    parts = [f"left alone beyond {_span(list(limits.values()))} times the median norm"]
    largest, share = (_at_capped_layers(profile, name) for name in ("largest_ordinary", "share"))
    if largest:
        parts.append(f"largest ordinary row {max(largest.values()):.3g}")
    if share:
        parts.append(f"at most {max(share.values()):.1%} of a layer's rows")
    return "; ".join(parts)


def sink_warnings(profile: CapProfile) -> list[str]:
    """A sentence for each doubt about the limits."""
    warnings = []
    if profile.provenance.get("norm_limits") == CONVERTED:
        warnings.append(
            "The limits of attention sinks come from an older rule, which lets rows pass that are sinks; a new "
            "calibration finds better ones."
        )
    near = {layer: share for layer, share in _at_capped_layers(profile, "near_the_limit").items() if share > OVERLAP}
    if near:
        word = "layers" if len(near) > 1 else "layer"
        warnings.append(
            f"At {word} {format_layers(near)} attention sinks and ordinary rows overlap: up to "
            f"{max(near.values()):.1%} of rows are near the limit."
        )
    return warnings


def _at_capped_layers(profile: CapProfile, name: str) -> dict[int, float]:
    """A figure of the provenance at each capped layer; empty if the provenance lacks it."""
    facts = profile.provenance.get("sinks")
    values = facts.get(name) if isinstance(facts, Mapping) else None
    if not isinstance(values, list) or len(values) <= profile.layers[-1]:
        return {}
    by_layer = {layer: values[layer] for layer in profile.layers}
    return by_layer if all(type(value) in (int, float) for value in by_layer.values()) else {}


def _span(values: list[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low}-{high}"
