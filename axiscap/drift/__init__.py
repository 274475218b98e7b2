"""Drift: where conversations go along the axis, read again from stored texts, or followed as they are written."""
