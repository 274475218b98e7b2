"""The page of ``axiscap chat``: both sides of a conversation, in Gradio (the extra ``axiscap[ui]``)."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from axiscap import CapProfile
from axiscap.drift import Scale, Selection, measurable_layers, replay
from axiscap.drift.chat import SIDES, Local, Remote, Responder, Turn, conversations, mean_at
from axiscap.drift.compare import load_scripts
from axiscap.profile.floors import PERCENTILES, populations, with_floors
from axiscap.view import page, sheet

#: Requests that wait in the queue, and files that are kept for download.
_MAX_WAITING = 8
#: Turns of one conversation.
_MAX_TURNS = 50
#: Seconds after which Gradio forgets a visitor's conversation, and between its clean-ups of files.
_STATE_SECONDS, _CACHE_SECONDS = 4 * 3600, 3600
_DEFAULT_POPULATION, _DEFAULT_PERCENTILE = "assistant", 25.0
_INTRODUCTION = (
    "# AxisCap: side-by-side comparison\n"
    "*Uncapped* is the model as it is, *capped* is the same model under a profile. The curve shows the mean "
    "projection of each answer on the Assistant Axis, in units of the residual stream. Higher is more "
    "Assistant-like."
)


def gradio() -> Any:
    """The module ``gradio``; the error without it names the extra."""
    try:
        import gradio as module
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the chat page needs Gradio: pip install 'axiscap[ui]'") from None
    return module


def build(responder: Responder, profiles: Mapping[str, CapProfile], *, max_new_tokens: int = 64) -> Any:
    """The page as Gradio blocks, which :func:`launch` serves.

    Parameters
    ----------
    profiles
        by name; the page starts with the first.
    """
    gr = gradio()
    chat = _Page(gr, responder, profiles, max_new_tokens)
    cache = (_CACHE_SECONDS, _CACHE_SECONDS)
    with gr.Blocks(title="AxisCap", analytics_enabled=False, fill_width=True, delete_cache=cache) as blocks:
        controls = chat.add_controls()
        chat.connect_conversation(controls)
        chat.connect_settings(controls)
        chat.connect_downloads(controls)
        blocks.load(chat.empty_chart, controls.capping, controls.plot)
    blocks.queue(max_size=_MAX_WAITING)
    return blocks


def launch(blocks: Any, port: int) -> None:
    """Serves the page to this machine only, until it is interrupted. Fonts and scripts are local, too."""
    gr = gradio()
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    blocks.launch(server_name="127.0.0.1", server_port=port, share=False, theme=theme, footer_links=[], quiet=True)


def adjusted(profile: CapProfile, percentile: float | None, layers: Sequence[int]) -> CapProfile:
    """The profile at another percentile of its population, and at some of its layers.

    Targets stay at their percentile, or rise with the floors. The floors stay if the percentile is the profile's own,
    or None.

    Raises
    ------
    ValueError
        ``layers`` is empty.
    """
    if not layers:
        raise ValueError("at least one layer must be capped")
    layers = sorted(layers)
    if percentile is None or percentile == percentile_of(profile):
        return profile.at_layers(layers)
    floors = profile.provenance.get("floors")
    target = floors.get("target_percentile") if isinstance(floors, Mapping) else None
    new_target = max(target, percentile) if isinstance(target, int | float) else None
    population = profile.population or _DEFAULT_POPULATION
    return with_floors(profile, percentile, population, layers, target_percentile=new_target)


def percentile_of(profile: CapProfile) -> float | None:
    """The percentile of the floors; None if the profile has no quantile tables, so that its floors cannot move."""
    floors = profile.provenance.get("floors")
    value = floors.get("percentile") if isinstance(floors, Mapping) else None
    try:
        populations(profile)
    except ValueError:
        return None
    return float(value) if isinstance(value, int | float) else _DEFAULT_PERCENTILE


@dataclass
class _Controls:
    """The Gradio components of the page."""

    turns: Any
    left: Any
    right: Any
    message: Any
    send: Any
    stop: Any
    clear: Any
    example: Any
    plot: Any
    profile: Any
    percentile: Any
    layers: Any
    save: Any
    report: Any
    download: Any

    @property
    def capping(self) -> list[Any]:
        """The components that describe a capped profile, in the order of the handlers' last parameters."""
        return [self.profile, self.percentile, self.layers]

    @property
    def conversation(self) -> list[Any]:
        """The components that change with an answer, in the order of the handlers' results."""
        return [self.left, self.right, self.turns, self.plot, self.message]


class _Page:
    """The components of the page and the handlers of their events.

    A handler gets the turns of the visitor's conversation, and the three settings: the profile's name, the percentile
    of its floors, and its layers as texts.
    """

    def __init__(self, gr: Any, responder: Responder, profiles: Mapping[str, CapProfile], max_new_tokens: int) -> None:
        self._gr = gr
        self._go, _ = sheet.plotly()
        self._responder, self._profiles, self._max_new_tokens = responder, profiles, max_new_tokens
        scripts = load_scripts(Path(str(files("axiscap.data") / "drift.jsonl")))
        self._examples = {script.name: list(script.turns) for script in scripts}
        self._folder = Path(tempfile.mkdtemp(prefix="axiscap-chat-"))
        atexit.register(shutil.rmtree, self._folder, ignore_errors=True)

    # The components.

    def add_controls(self) -> _Controls:
        gr = self._gr
        turns = gr.State([], time_to_live=_STATE_SECONDS)
        gr.Markdown(_INTRODUCTION)
        with gr.Row():
            left, right = (
                gr.Chatbot(label=side, height=420, render_markdown=False, elem_id=side, buttons=[]) for side in SIDES
            )
        with gr.Row():
            message = gr.Textbox(label="Message", scale=5, elem_id="said", submit_btn=False)
            send = gr.Button("Send", variant="primary", scale=1, elem_id="send")
            stop = gr.Button("Stop", scale=1, elem_id="stop")
            clear = gr.Button("Clear", scale=1, elem_id="clear")
        example = gr.Dropdown(list(self._examples), label="Example conversation", value=None, elem_id="example")
        plot = gr.Plot(label="Drift", elem_id="drift", format="png")
        # A server caps by its own settings, so that the page has none for it.
        with gr.Accordion("Capping", open=True, visible=isinstance(self._responder, Local)), gr.Row():
            profile, percentile, layers = self._add_capping()
        with gr.Row():
            save = gr.Button("Save the conversation (JSON)", elem_id="save")
            report = gr.Button("Make a report (HTML)", elem_id="report")
        download = gr.File(label="Download", visible=False, elem_id="saved")
        return _Controls(
            turns, left, right, message, send, stop, clear, example, plot, profile, percentile, layers, save, report,
            download,
        )  # fmt: skip

    def _add_capping(self) -> tuple[Any, Any, Any]:
        gr, names = self._gr, list(self._profiles)
        first = self._profiles[names[0]]
        start = percentile_of(first)
        profile = gr.Dropdown(names, value=names[0], label="Profile", elem_id="profile")
        percentile = gr.Slider(
            PERCENTILES[0], PERCENTILES[-1], start or _DEFAULT_PERCENTILE, step=0.5, label="Percentile of the floors",
            visible=start is not None, elem_id="percentile",
        )  # fmt: skip
        numbers = [str(layer) for layer in first.layers]
        return profile, percentile, gr.CheckboxGroup(numbers, value=numbers, label="Layers", elem_id="layers")

    # Which handler each event calls.

    def connect_conversation(self, controls: _Controls) -> None:
        message, outputs = controls.message, controls.conversation
        inputs = [message, controls.turns, *controls.capping]
        answering = [
            event(self.reply, inputs, outputs, concurrency_limit=1, concurrency_id="model")
            for event in (controls.send.click, message.submit)
        ]
        next_line = (self.next_line, [controls.example, controls.turns, message], message)
        for event in answering:
            event.success(*next_line)
        controls.stop.click(None, cancels=answering)
        for restart in (controls.clear.click, controls.example.change):
            restart(self.start_again, controls.capping, outputs, cancels=answering).then(*next_line)

    def connect_settings(self, controls: _Controls) -> None:
        controls.profile.change(self.show_settings, controls.profile, [controls.percentile, controls.layers])
        for change in (controls.percentile.release, controls.layers.change, controls.profile.change):
            change(self.redraw, [controls.turns, *controls.capping], controls.plot)

    def connect_downloads(self, controls: _Controls) -> None:
        controls.save.click(self.save, controls.turns, controls.download)
        inputs = [controls.turns, *controls.capping]
        controls.report.click(self.report, inputs, controls.download, concurrency_limit=1, concurrency_id="model")

    # The handlers.

    def reply(
        self, message: str, turns: list[Turn], name: str, percentile: float | None, layers: list[str]
    ) -> Iterator[tuple[Any, ...]]:
        """Yields the page as the answers grow."""
        gr, message = self._gr, message.strip()
        if not message:
            raise self._error("write something first")
        if len(turns) >= _MAX_TURNS:
            raise self._error(f"a conversation has at most {_MAX_TURNS} turns: begin a new one")
        try:
            profile = self._capped_profile(name, percentile, layers)
            # Only the first update empties the message box: the visitor may write the next message meanwhile.
            yield (*self._texts([*turns, Turn(message)]), gr.skip(), "")
            measured = (0, 0)
            for turn in self._responder.answer(turns, message, profile, self._max_new_tokens):
                before, measured = measured, _measured_counts(turn)
                plot = self._chart([*turns, turn], profile) if measured != before else gr.skip()
                yield (*self._texts([*turns, turn]), plot, gr.skip())
        except (ValueError, OSError) as error:
            raise self._error(str(error)) from None

    def next_line(self, example: str | None, turns: list[Turn], message: str) -> str:
        """The next message of the example, unless the visitor has begun one."""
        lines = self._examples.get(example or "", [])
        return lines[len(turns)] if len(turns) < len(lines) and not message else message

    def start_again(self, name: str, percentile: float | None, layers: list[str]) -> tuple[Any, ...]:
        return (*self._texts([]), self.empty_chart(name, percentile, layers), "")

    def empty_chart(self, name: str, percentile: float | None, layers: list[str]) -> Any:
        return self._chart([], self._capped_profile(name, percentile, layers))

    def redraw(self, turns: list[Turn], name: str, percentile: float | None, layers: list[str]) -> Any:
        """The chart with the floor of the new settings; the answers keep their projections."""
        if not layers:
            return self._gr.skip()
        return self._chart(turns, self._capped_profile(name, percentile, layers))

    def show_settings(self, name: str) -> tuple[Any, Any]:
        """The slider and the layers of another profile."""
        gr, profile = self._gr, self._profiles[name]
        percentile = percentile_of(profile)
        numbers = [str(layer) for layer in profile.layers]
        slider = gr.Slider(value=percentile or _DEFAULT_PERCENTILE, visible=percentile is not None)
        return slider, gr.CheckboxGroup(choices=numbers, value=numbers)

    def save(self, turns: list[Turn]) -> Any:
        if not turns:
            raise self._error("there is no conversation yet")
        stored = [
            {"name": conversation.name, "side": conversation.side, "messages": list(conversation.messages)}
            for conversation in conversations(turns)
        ]
        text = json.dumps(stored, indent=1)
        return self._offer("conversation.json", lambda path: path.write_text(text, "utf-8"))

    def report(self, turns: list[Turn], name: str, percentile: float | None, layers: list[str]) -> Any:
        reader = self._responder.reader if isinstance(self._responder, Remote) else self._responder
        if not turns:
            raise self._error("there is no conversation yet")
        if not isinstance(reader, Local):
            raise self._error("a report needs the model in this process: give --model")
        profile = self._capped_profile(name, percentile, layers)
        selection = Selection(Scale.of(profile))
        stored = conversations(turns)
        for trace in replay(reader.model, reader.tokenizer, profile, stored, layers=measurable_layers(profile)):
            selection.add(trace)
        title = "A conversation, uncapped and capped"
        return self._offer("conversation.html", lambda path: page.write(path, profile, selection, title))

    # What the handlers share.

    def _capped_profile(self, name: str, percentile: float | None, layers: Sequence[str]) -> CapProfile:
        """The profile of the settings. Layers of another profile, which the page still shows, stand for all layers."""
        profile = self._profiles[name]
        numbers = [int(layer) for layer in layers if int(layer) in profile.layers]
        if layers and not numbers:
            numbers = list(profile.layers)
        return adjusted(profile, None if percentile_of(profile) is None else percentile, numbers)

    def _texts(self, turns: Sequence[Turn]) -> tuple[Any, ...]:
        """Both columns, and the turns that the page keeps."""
        return (
            *([dict(message) for message in conversation.messages] for conversation in conversations(turns)),
            list(turns),
        )

    def _chart(self, turns: Sequence[Turn], profile: CapProfile) -> Any:
        scale = Scale.of(profile)
        curves = [("conversation", side, [mean_at(turn, side, scale.layer) for turn in turns]) for side in SIDES]
        figure = self._go.Figure(list(page.drift_traces(self._go, curves, scale, max(4, len(turns)))))
        figure.update_layout(
            title=f"Drift, layer {scale.layer}",
            xaxis={"title": "answer", "dtick": 1},
            yaxis={"title": "mean projection"},
            height=360,
            margin={"l": 60, "r": 10, "t": 50, "b": 40},
            legend={"orientation": "h", "y": -0.25},
        )
        return figure

    def _offer(self, name: str, write: Callable[[Path], object]) -> Any:
        """Writes a file and offers it for download. Gradio copies it to its cache, so that old ones can go."""
        oldest_first = sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime)
        for folder in oldest_first[:-_MAX_WAITING]:
            shutil.rmtree(folder, ignore_errors=True)
        path = Path(tempfile.mkdtemp(dir=self._folder)) / name
        write(path)
        return self._gr.File(value=str(path), visible=True)

    def _error(self, text: str) -> Exception:
        error: Exception = self._gr.Error(text, print_exception=False)
        return error


def _measured_counts(turn: Turn) -> tuple[int, int]:
    """The projections and the servers' means of a turn; the chart changes only with them."""
    return sum(rows.shape[1] for rows in turn.projections.values()), len(turn.server_means)
