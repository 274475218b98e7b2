"""A conversation in the terminal, uncapped and capped side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel

from axiscap import CapProfile
from axiscap.drift import Scale
from axiscap.drift.chat import SIDES, Responder, Turn, mean_at


def converse(
    responder: Responder, profile: CapProfile, console: Console, lines: Iterator[str], *, max_new_tokens: int = 64
) -> list[Turn]:
    """A conversation in a terminal: for each line both answers side by side, with their mean projections."""
    scale = Scale.of(profile)
    turns: list[Turn] = []
    for message in lines:
        if not message.strip():
            continue
        turn = Turn(message)
        with Live(console=console, refresh_per_second=8, transient=not console.is_terminal) as live:
            for turn in responder.answer(turns, message, profile, max_new_tokens):
                live.update(_panels(turn, scale))
        turns.append(turn)
        if not console.is_terminal:
            console.print(_panels(turn, scale))
    return turns


def _panels(turn: Turn, scale: Scale) -> Columns:
    panels = []
    for side in SIDES:
        mean = mean_at(turn, side, scale.layer)
        below = " (below the floor)" if mean < scale.floor else ""
        note = "" if math.isnan(mean) else f"{mean:.4g}{below}, floor {scale.floor:.4g}"
        panels.append(Panel(escape(turn.texts[side]), title=side, subtitle=note))
    return Columns(panels, equal=True, expand=True)
