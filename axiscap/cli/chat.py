"""``axiscap chat``: a conversation, uncapped and capped side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from axiscap import CapProfile, models
from axiscap.cli.console import console
from axiscap.cli.options import AnswerTokensOption


def chat(
    profiles: Annotated[list[Path], typer.Argument(help="One or more profiles to choose from on the page.")],
    model: Annotated[
        str | None,
        typer.Option(help="The model: a local folder or a hub name. With --base-url, it only measures the answers."),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server with AxisCap, such as http://127.0.0.1:8000/v1.")
    ] = None,
    uncapped: Annotated[
        str,
        typer.Option(help="With --base-url: the profile of the left side, which is off or a profile of strength 0."),
    ] = "off",
    terminal: Annotated[
        bool, typer.Option("--terminal", help="Chat in this terminal, with the first profile, and not in a browser.")
    ] = False,
    port: Annotated[int, typer.Option(help="The port of the page, which this machine alone can reach.")] = 7860,
    max_new_tokens: AnswerTokensOption = 64,
) -> None:
    """Chat with a model, uncapped and capped side by side, and see where its answers lie along the axis."""
    from axiscap.drift import chat as chats
    from axiscap.view import chat as terminal_chat
    from axiscap.view import chat_page

    loaded = {path.stem: CapProfile.load(path) for path in profiles}
    if len(loaded) < len(profiles):
        raise ValueError("the profiles must have different names")
    if not terminal:
        chat_page.gradio()  # its absence must not end the command after the model is loaded
    local = None
    if model is not None or base_url is None:
        local = chats.Local(*models.load(model or models.DEFAULT_MODEL))
    responder = local if base_url is None else chats.Remote(base_url, local, uncapped)
    assert responder is not None
    if terminal:
        console.print("Write a line; an empty line, or the end of the input, ends the conversation.")
        lines = iter(_read_line, "")
        terminal_chat.converse(responder, next(iter(loaded.values())), console, lines, max_new_tokens=max_new_tokens)
    else:
        console.print(f"http://127.0.0.1:{port}  (Ctrl-C ends it)")
        chat_page.launch(chat_page.build(responder, loaded, max_new_tokens=max_new_tokens), port)


def _read_line() -> str:
    try:
        return console.input("[bold]> [/bold]").strip()
    except EOFError:
        return ""
