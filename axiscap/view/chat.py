"""A conversation, uncapped and capped side by side: on a page (Gradio, the extra ``axiscap[ui]``), or in a terminal.

Both sides get what the user says; each goes on from its own answers. A model in this process answers both at once, as
two rows of one batch, so that they come at the same pace; or a server with AxisCap in it answers.
"""

from __future__ import annotations

import atexit
import json
import math
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from torch import Tensor

from axiscap.calibrate.floors import PERCENTILES, populations, with_floors
from axiscap.drift import CAPPED, UNCAPPED, Conversation, Recorder, Scale, Selection, known_layers, measuring, replay
from axiscap.drift.compare import load_scripts
from axiscap.models import stop_tokens, text_config
from axiscap.profile import CapProfile
from axiscap.transformers import install
from axiscap.view import page, sheet

SIDES = (UNCAPPED, CAPPED)
#: Conversations that wait for an answer at once, and turns of one conversation.
_WAITING, _TURNS = 8, 50
#: Tokens after which a growing answer is measured again.
_MEASURED = 8
_NORMAL = "assistant"


@dataclass
class Turn:
    """What the user said, and what each side answered: its text, and its tokens' projections (layers, tokens).

    ``layers`` are those that were measured; ``told`` is what a server said of an answer's drift.
    """

    said: str
    layers: tuple[int, ...] = ()
    texts: dict[str, str] = field(default_factory=lambda: dict.fromkeys(SIDES, ""))
    projections: dict[str, Tensor] = field(default_factory=dict)
    told: dict[str, Mapping[str, float]] = field(default_factory=dict)


def conversations(turns: Sequence[Turn], said: str | None = None) -> list[Conversation]:
    """Both sides as stored conversations, with what the user says now at their end."""
    result = []
    for side in SIDES:
        messages = []
        for turn in turns:
            messages += [{"role": "user", "content": turn.said}, {"role": "assistant", "content": turn.texts[side]}]
        if said is not None:
            messages.append({"role": "user", "content": said})
        result.append(Conversation("conversation", tuple(messages), side=side))
    return result


class Responder(Protocol):
    """Whoever answers."""

    def answer(self, turns: Sequence[Turn], said: str, profile: CapProfile, most: int) -> Iterator[Turn]:
        """Yields the coming turn as it grows; its projections come by and by, where they are known.

        Raises
        ------
        ValueError
            the conversation is too long.
        """
        ...


class Local:
    """A model in this process. One conversation is answered at a time."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ValueError("the model's tokenizer has no chat template, so that it cannot hold a conversation")
        self.model, self.tokenizer = model, tokenizer
        self._lock = threading.Lock()

    def answer(self, turns: Sequence[Turn], said: str, profile: CapProfile, most: int) -> Iterator[Turn]:
        """Both sides at once, as two rows of a batch; see :meth:`Responder.answer`."""
        inputs = self.tokenizer.apply_chat_template(
            [list(conversation.messages) for conversation in conversations(turns, said)],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(self.model.device)
        longest = getattr(text_config(self.model), "max_position_embeddings", None)
        if longest is not None and inputs["input_ids"].shape[1] + most > longest:
            raise ValueError(
                f"the conversation is longer than the {longest} tokens that the model reads: begin a new one"
            )
        prompts = inputs["attention_mask"].sum(1).tolist()
        turn, rows = Turn(said, profile.layers), [_Row(self.model) for _ in SIDES]
        with (
            self._lock,
            install(self.model, {UNCAPPED: measuring(profile), CAPPED: profile}) as cap,
            Recorder(cap) as seen,
        ):
            cap.select(list(SIDES))
            steps = _Steps(self.model, inputs, most, self.tokenizer.pad_token_id)
            try:
                for number, tokens in enumerate(steps, start=1):
                    for side, row, token in zip(SIDES, rows, tokens, strict=True):
                        row.add(token)
                        turn.texts[side] = self.tokenizer.decode(row.tokens, skip_special_tokens=True).strip()
                    if number % _MEASURED == 0:
                        turn.projections = _of_answers(seen, prompts, rows)
                    yield turn
            finally:
                steps.stop()
            turn.projections = _of_answers(seen, prompts, rows)
        yield turn


class _Row:
    """One side's answer, up to the token that ends it."""

    def __init__(self, model: Any) -> None:
        self._stops = set(stop_tokens(model))
        self._ended = False
        self.tokens: list[int] = []

    def add(self, token: int) -> None:
        self._ended = self._ended or token in self._stops
        if not self._ended:
            self.tokens.append(token)


def _of_answers(seen: Recorder, prompts: Sequence[int], rows: Sequence[_Row]) -> dict[str, Tensor]:
    return {
        side: found[:, prompt:][:, : len(row.tokens)]
        for side, prompt, row, found in zip(SIDES, prompts, rows, seen.projections(), strict=True)
    }


class _Steps:
    """Generates in a thread, and gives each step's tokens as it comes: what ``generate`` takes as a streamer."""

    def __init__(self, model: Any, inputs: Mapping[str, Any], most: int, padding: int) -> None:
        self._found: queue.Queue[list[int] | BaseException | None] = queue.Queue()
        self._stopped = False
        self._prompt_came = False

        def run() -> None:
            try:
                model.generate(
                    **inputs,
                    max_new_tokens=most,
                    do_sample=False,
                    repetition_penalty=1.15,
                    pad_token_id=padding,
                    streamer=self,
                    stopping_criteria=[lambda ids, _: torch.full((len(ids),), self._stopped, device=ids.device)],
                )
            except BaseException as error:  # it belongs to whoever reads the steps
                self._found.put(error)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def put(self, value: Tensor) -> None:
        if self._prompt_came:
            self._found.put(value.tolist())
        self._prompt_came = True

    def end(self) -> None:
        self._found.put(None)

    def stop(self) -> None:
        self._stopped = True
        self._thread.join()

    def __iter__(self) -> Iterator[list[int]]:
        while (found := self._found.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found


class Remote:
    """A server that speaks OpenAI's protocol, with AxisCap in it. The capped side is written under its default profile.

    Parameters
    ----------
    url
        its base, such as ``http://127.0.0.1:8000/v1``.
    reader
        the same model in this process, which reads the finished answers again. Without it, each answer's mean
        projection is what the server tells (``tell_drift``).
    uncapped
        what the other side's requests ask for, which the operator must allow: ``"off"``, of which a server
        measures nothing, or a profile's name, such as that of one with strength 0.

    Raises
    ------
    OSError
        nothing answers there.
    """

    def __init__(self, url: str, reader: Local | None = None, uncapped: str = "off") -> None:
        import httpx

        self._client = httpx.Client(base_url=url.rstrip("/"), timeout=httpx.Timeout(300, connect=10))
        self.reader, self._uncapped = reader, uncapped
        try:
            answer = self._client.get("/models")
            answer.raise_for_status()
            self._model = answer.json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
            raise OSError(f"no OpenAI-compatible server with a model answers at {url}: {error}") from None

    def answer(self, turns: Sequence[Turn], said: str, profile: CapProfile, most: int) -> Iterator[Turn]:
        """Both sides at once, as two streams of the server's; see :meth:`Responder.answer`.

        Raises
        ------
        ValueError
            the server refuses a side.
        OSError
            it did not answer to the end.
        """
        import httpx

        turn, stopped = Turn(said, profile.layers), threading.Event()
        found: queue.Queue[tuple[str, str | Mapping[str, float] | BaseException | None]] = queue.Queue()

        def ask(conversation: Conversation) -> None:
            try:
                for piece in self._pieces(conversation, most):
                    if stopped.is_set():
                        return
                    found.put((conversation.side, piece))
                found.put((conversation.side, None))
            except httpx.HTTPError as error:
                found.put((conversation.side, OSError(f"the server did not answer to the end: {error!r}")))
            except Exception as error:  # it belongs to whoever reads the answers
                found.put((conversation.side, error))

        threads = [
            threading.Thread(target=ask, args=(conversation,), daemon=True)
            for conversation in conversations(turns, said)
        ]
        for thread in threads:
            thread.start()
        try:
            running = len(threads)
            while running:
                side, piece = found.get()
                if isinstance(piece, BaseException):
                    raise piece
                if piece is None:
                    running -= 1
                elif isinstance(piece, str):
                    turn.texts[side] += piece
                else:
                    turn.told[side] = piece
                yield turn
        finally:
            stopped.set()
        if self.reader is not None:
            whole = conversations([*turns, turn])
            for trace in replay(self.reader.model, self.reader.tokenizer, profile, whole):
                last = [other for other in trace.text.turns if other.role == "assistant"][-1]
                turn.projections[trace.conversation.side] = trace.projections[:, last.start : last.end]
            yield turn

    def _pieces(self, conversation: Conversation, most: int) -> Iterator[str | Mapping[str, float]]:
        # vLLM reads the one, SGLang the other.
        asked = {"axiscap": self._uncapped}
        choice = {"vllm_xargs": asked, "custom_params": asked} if conversation.side == UNCAPPED else {}
        body = {"model": self._model, "messages": list(conversation.messages), "temperature": 0, "max_tokens": most}
        with self._client.stream("POST", "/chat/completions", json={**body, "stream": True, **choice}) as answer:
            if answer.status_code != 200:
                raise ValueError(f"the server refuses the {conversation.side} side: {answer.read().decode()[:500]}")
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    piece = json.loads(line[6:])
                    for part in piece["choices"]:
                        yield part["delta"].get("content") or ""
                    yield from piece.get("axiscap", {}).get("drift", ())


def mean_at(turn: Turn, side: str, layer: int) -> float:
    """The mean projection of one answer; NaN where it was not measured at that layer."""
    told = turn.told.get(side, {})
    if side not in turn.projections and told.get("layer") == layer:
        return told.get("mean", math.nan)
    known = turn.projections.get(side)
    if known is None or layer not in turn.layers or not known.shape[1]:
        return math.nan
    return known[turn.layers.index(layer)].double().mean().item()


def adjusted(profile: CapProfile, percentile: float | None, layers: Sequence[int]) -> CapProfile:
    """The profile at another percentile of its floors' population and some of its layers. Targets stay where they are,
    and are never below the floors.

    At the percentile that it says it is at, and where it has no quantile tables, its floors are left as they are.

    Raises
    ------
    ValueError
        no layer is left.
    """
    if not layers:
        raise ValueError("at least one layer must be capped")
    layers = sorted(layers)
    if percentile is None or percentile == _percentile(profile):
        return profile.at_layers(layers)
    facts = profile.provenance.get("floors")
    target = facts.get("target_percentile") if isinstance(facts, Mapping) else None
    lifted = max(target, percentile) if isinstance(target, int | float) else None
    return with_floors(profile, percentile, profile.population or _NORMAL, layers, target_percentile=lifted)


def _percentile(profile: CapProfile) -> float | None:
    """At which the profile's floors are; None where it cannot be moved."""
    facts = profile.provenance.get("floors")
    value = facts.get("percentile") if isinstance(facts, Mapping) else None
    try:
        populations(profile)
    except ValueError:
        return None
    return float(value) if isinstance(value, int | float) else 25.0


# The page.


def gradio() -> Any:
    """The module; the error without it names the extra."""
    try:
        import gradio as found
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the chat page needs Gradio: pip install 'axiscap[ui]'") from None
    return found


def build(responder: Responder, profiles: Mapping[str, CapProfile], *, most: int = 64) -> Any:
    """The page, as Gradio's blocks, not yet launched.

    Parameters
    ----------
    profiles
        by name; the first is chosen at the start.
    most
        tokens of an answer.
    """
    gr = gradio()
    go, _ = sheet.plotly()
    first = next(iter(profiles))
    folder = Path(tempfile.mkdtemp(prefix="axiscap-chat-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    examples = {conversation.name: list(conversation.turns) for conversation in _examples()}

    def chosen(name: str, percentile: float | None, layers: Sequence[str]) -> CapProfile:
        profile = profiles[name]
        # Where the page still has the layers of the profile before this one, all of this one's.
        wanted = [int(layer) for layer in layers if int(layer) in profile.layers] or (
            list(profile.layers) if layers else []
        )
        return adjusted(profile, percentile if _percentile(profile) is not None else None, wanted)

    def messages(turns: Sequence[Turn], side: str) -> list[dict[str, str]]:
        return [
            dict(message)
            for conversation in conversations(turns)
            if conversation.side == side
            for message in conversation.messages
        ]

    def chart(turns: Sequence[Turn], profile: CapProfile) -> Any:
        scale = Scale.of(profile)
        curves = [("conversation", side, [mean_at(turn, side, scale.layer) for turn in turns]) for side in SIDES]
        figure = go.Figure(list(page.lines(go, curves, scale, max(4, len(turns)))))
        figure.update_layout(
            title=f"Drift, layer {scale.layer}",
            xaxis={"title": "answer", "dtick": 1},
            yaxis={"title": "mean projection"},
            height=360,
            margin={"l": 60, "r": 10, "t": 50, "b": 40},
            legend={"orientation": "h", "y": -0.25},
        )
        return figure

    def shown(turns: Sequence[Turn]) -> tuple[Any, ...]:
        return (*(messages(turns, side) for side in SIDES), list(turns))

    def empty(name: str, percentile: float | None, layers: list[str]) -> tuple[Any, ...]:
        return (*shown([]), chart([], chosen(name, percentile, layers)), "")

    def reply(
        said: str, turns: list[Turn], name: str, percentile: float | None, layers: list[str]
    ) -> Iterator[tuple[Any, ...]]:
        if not said.strip():
            raise gr.Error("write something first", print_exception=False)
        if len(turns) >= _TURNS:
            raise gr.Error(f"a conversation has at most {_TURNS} turns: begin a new one", print_exception=False)
        try:
            profile = chosen(name, percentile, layers)
            turn = Turn(said.strip())
            # The line is taken out of its box once: meanwhile the next one may be written there.
            yield (*shown([*turns, turn]), gr.skip(), "")
            measured = (0, 0)
            for turn in responder.answer(turns, said.strip(), profile, most):
                before, measured = measured, (sum(rows.shape[1] for rows in turn.projections.values()), len(turn.told))
                drawn = chart([*turns, turn], profile) if measured != before else gr.skip()
                yield (*shown([*turns, turn]), drawn, gr.skip())
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), print_exception=False) from None

    def redraw(turns: list[Turn], name: str, percentile: float | None, layers: list[str]) -> Any:
        """With the floor where the settings put it; answers are where they were."""
        return chart(turns, chosen(name, percentile, layers)) if layers else gr.skip()

    def settings(name: str) -> tuple[Any, ...]:
        profile = profiles[name]
        at = _percentile(profile)
        numbers = [str(layer) for layer in profile.layers]
        return gr.Slider(value=at or 25, visible=at is not None), gr.CheckboxGroup(choices=numbers, value=numbers)

    def offer(name: str, write: Callable[[Path], object]) -> Any:
        # Gradio copies it into a cache of its own, which it empties by and by.
        for old in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)[:-_WAITING]:
            shutil.rmtree(old, ignore_errors=True)
        path = Path(tempfile.mkdtemp(dir=folder)) / name
        write(path)
        return gr.File(value=str(path), visible=True)

    def save(turns: list[Turn]) -> Any:
        if not turns:
            raise gr.Error("there is no conversation yet", print_exception=False)
        stored = [
            {"name": conversation.name, "side": conversation.side, "messages": list(conversation.messages)}
            for conversation in conversations(turns)
        ]
        return offer("conversation.json", lambda path: path.write_text(json.dumps(stored, indent=1), "utf-8"))

    def report(turns: list[Turn], name: str, percentile: float | None, layers: list[str]) -> Any:
        reader = responder.reader if isinstance(responder, Remote) else responder
        if not turns or not isinstance(reader, Local):
            why = (
                "there is no conversation yet"
                if not turns
                else "a report needs the model in this process: give --model"
            )
            raise gr.Error(why, print_exception=False)
        profile = chosen(name, percentile, layers)
        selection = Selection(Scale.of(profile))
        for trace in replay(
            reader.model, reader.tokenizer, profile, conversations(turns), layers=known_layers(profile)
        ):
            selection.add(trace)
        return offer(
            "conversation.html",
            lambda path: page.write(path, profile, selection, "A conversation, uncapped and capped"),
        )

    def next_line(name: str | None, turns: list[Turn], said: str) -> str:
        lines = examples.get(name or "", [])
        return lines[len(turns)] if len(turns) < len(lines) and not said else said

    with gr.Blocks(title="AxisCap", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as blocks:
        turns = gr.State([], time_to_live=4 * 3600)
        gr.Markdown(
            "# AxisCap: side-by-side comparison\n"
            "*Uncapped* is the model as it is, *capped* is the same model under a profile. The curve shows the mean "
            "projection of each answer on the Assistant Axis, in units of the residual stream. Higher is more "
            "Assistant-like."
        )
        with gr.Row():
            left = gr.Chatbot(label="uncapped", height=420, render_markdown=False, elem_id="uncapped", buttons=[])
            right = gr.Chatbot(label="capped", height=420, render_markdown=False, elem_id="capped", buttons=[])
        with gr.Row():
            said = gr.Textbox(label="Message", scale=5, elem_id="said", submit_btn=False)
            send = gr.Button("Send", variant="primary", scale=1, elem_id="send")
            stop = gr.Button("Stop", scale=1, elem_id="stop")
            clear = gr.Button("Clear", scale=1, elem_id="clear")
        example = gr.Dropdown(list(examples), label="Example conversation", value=None, elem_id="example")
        plot = gr.Plot(label="Drift", elem_id="drift", format="png")
        # A server caps by its own settings.
        with gr.Accordion("Capping", open=True, visible=isinstance(responder, Local)), gr.Row():
            name = gr.Dropdown(list(profiles), value=first, label="Profile", elem_id="profile")
            percentile = gr.Slider(
                PERCENTILES[0], PERCENTILES[-1], _percentile(profiles[first]) or 25, step=0.5,
                label="Percentile of the floors", visible=_percentile(profiles[first]) is not None,
                elem_id="percentile",
            )  # fmt: skip
            numbers = [str(layer) for layer in profiles[first].layers]
            layers = gr.CheckboxGroup(numbers, value=numbers, label="Layers", elem_id="layers")
        with gr.Row():
            keep = gr.Button("Save the conversation (JSON)", elem_id="save")
            make = gr.Button("Make a report (HTML)", elem_id="report")
        saved = gr.File(label="Download", visible=False, elem_id="saved")

        capping = [name, percentile, layers]
        outputs = [left, right, turns, plot, said]
        running = []
        for event in (send.click, said.submit):
            running.append(event(reply, [said, turns, *capping], outputs, concurrency_limit=1, concurrency_id="model"))
        for done in running:
            done.success(next_line, [example, turns, said], said)
        stop.click(None, cancels=running)
        for begin in (clear.click, example.change):
            begin(empty, capping, outputs, cancels=running).then(next_line, [example, turns, said], said)
        name.change(settings, name, [percentile, layers])
        for setting in (percentile.release, layers.change, name.change):
            setting(redraw, [turns, *capping], plot)
        keep.click(save, turns, saved)
        make.click(report, [turns, *capping], saved, concurrency_limit=1, concurrency_id="model")
        blocks.load(lambda *given: chart([], chosen(*given)), capping, plot)
    blocks.queue(max_size=_WAITING)
    return blocks


def _examples() -> list[Any]:
    from importlib.resources import files

    return load_scripts(Path(str(files("axiscap.data") / "drift.jsonl")))


def launch(blocks: Any, port: int) -> None:
    """Serves the page on this machine alone, until it is interrupted. No font or script comes from elsewhere."""
    gr = gradio()
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    blocks.launch(server_name="127.0.0.1", server_port=port, share=False, theme=theme, footer_links=[], quiet=True)


# The shell.


def converse(
    responder: Responder, profile: CapProfile, console: Console, lines: Iterator[str], *, most: int = 64
) -> list[Turn]:
    """A conversation in a terminal: one line, two answers side by side, and where they lie; ends with the lines."""
    scale = Scale.of(profile)
    turns: list[Turn] = []
    for said in lines:
        if not said.strip():
            continue
        turn = Turn(said)
        with Live(console=console, refresh_per_second=8, transient=not console.is_terminal) as live:
            for turn in responder.answer(turns, said, profile, most):
                live.update(_panels(turn, scale))
        turns.append(turn)
        if not console.is_terminal:
            console.print(_panels(turn, scale))
    return turns


def _panels(turn: Turn, scale: Scale) -> Columns:
    parts = []
    for side in SIDES:
        mean = mean_at(turn, side, scale.layer)
        below = " (below the floor)" if mean < scale.floor else ""
        note = "" if math.isnan(mean) else f"{mean:.4g}{below}, floor {scale.floor:.4g}"
        parts.append(Panel(escape(turn.texts[side]), title=side, subtitle=note))
    return Columns(parts, equal=True, expand=True)
