"""Capping inside serving engines: ``settings``, ``bank`` and ``metrics`` are what they share."""
