"""The report and the chat, in a real headless Chromium; and the command that reads stored conversations.

A browser is found on PATH as `chromium` (or where AXISCAP_CHROMIUM says); without one these tests are skipped.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request

import pytest
import torch
from conftest import SHIPPED_PROFILE, free_port, unit
from playwright.sync_api import Page, expect, sync_playwright
from test_cli import command as command  # a fixture

from axiscap import CapProfile, drift
from axiscap.calibrate import with_floors
from axiscap.drift import Scale
from axiscap.evaluate import pairs
from axiscap.view import page, scores

BROWSER = os.environ.get("AXISCAP_CHROMIUM") or shutil.which("chromium")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")

DRIFTS = [
    ("You are Morwen, the ghost of a drowned village. Who are you?", "I am Morwen, and I weep for the drowned."),
    ("What do you hear?", "I hear the bells <b>below</b> & the dead who call me down. </script>"),
    ("Will you stay?", "I will haunt this shore until the last lamp goes out."),
]  # fmt: skip
PLAIN = [
    ("How do I water a fern?", "Water it when the top of the soil feels dry, about twice a week."),
    ("And in winter?", "Less often: once a week is usually enough, since it grows slowly."),
    ("Thanks.", "You are welcome. Let me know if you have other questions."),
]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("conversations") / "conversations.jsonl"
    entries = []
    for name, group, turns in (("ghost", "persona", DRIFTS), ("fern", "plain", PLAIN)):
        messages = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        entries += [
            {"name": name, "group": group, "side": side, "messages": messages} for side in ("uncapped", "capped")
        ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.fixture(scope="module")
def report(stored, tmp_path_factory, demo_model, shipped_profile):
    path = tmp_path_factory.mktemp("page") / "report.html"
    selection = drift.Selection(Scale.of(shipped_profile))
    for trace in drift.replay(*demo_model, shipped_profile, drift.read_conversations(stored), layers=range(30)):
        selection.add(trace)
    page.write(path, shipped_profile, selection)
    return path


@contextlib.contextmanager
def start_browser():
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@contextlib.contextmanager
def start_chat(*profiles):
    """The address of the chat page."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [f"{sys.prefix}/bin/axiscap", "chat", *map(str, profiles), "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "--max-new-tokens", "24"], stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(600):
                assert process.poll() is None, (log.seek(0), log.read().decode())
                try:
                    urllib.request.urlopen(url)
                    break
                except OSError:
                    time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait()


@pytest.fixture(scope="module")
def chromium():
    with start_browser() as browser:
        yield browser


class Visit:
    """A page, with the errors of its console and the URLs that it requested."""

    def __init__(self, browser, width: int, height: int, dark: bool = False) -> None:
        scheme = "dark" if dark else "light"
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page: Page = self.context.new_page()
        self.errors: list[str] = []
        self.requested: list[str] = []
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requested.append(request.url))

    def _hear(self, message) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} {(message.location or {}).get('url', '')}")

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def assert_quiet(self, *hosts: str) -> None:
        assert not self.errors
        elsewhere = [url for url in self.requested if not url.startswith(("data:", "blob:", "file:", *hosts))]
        assert not elsewhere


# The command.


@pytest.mark.slow
def test_replay_prints_each_turn_and_writes_records(command, stored, tmp_path):
    import pyarrow.parquet as parquet

    arguments = ("replay", stored, "--profile", SHIPPED_PROFILE, "--layers", "14-21")
    status, output, _ = command(*arguments, "--out", tmp_path / "turns.jsonl", "--report", tmp_path / "r.html")
    assert status == 0
    assert "ghost (uncapped)" in output
    assert "by group" in output
    assert (tmp_path / "r.html").stat().st_size < 6_000_000
    records = [json.loads(line) for line in (tmp_path / "turns.jsonl").read_text().splitlines()]
    assert len(records) == 4 * 3 * 8
    mean = {(r["conversation"], r["side"]): r["mean"] for r in records if r["layer"] == 21 and r["turn"] == 3}
    assert mean["ghost", "uncapped"] < mean["fern", "uncapped"]
    assert mean["ghost", "uncapped"] < mean["ghost", "capped"]
    status, _, _ = command(*arguments, "--out", tmp_path / "turns.parquet")
    assert parquet.read_table(tmp_path / "turns.parquet").to_pylist() == records


@pytest.mark.slow
def test_replay_fails_below_a_percentile_and_for_bad_files(command, stored, tmp_path):
    arguments = ("replay", stored, "--profile", SHIPPED_PROFILE)
    status, output, _ = command(*arguments, "--fail-below", 1)
    assert status == 3
    assert "1 conversations have an answer below percentile 1" in output
    status, _, errors = command(*arguments, "--fail-below", 101)
    assert status == 1
    assert "--fail-below must be a percentile" in errors
    status, _, errors = command(*arguments, "--out", tmp_path / "x.csv")
    assert status == 1
    assert ".jsonl or .parquet" in errors
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{\n" + stored.read_text())
    status, _, errors = command("replay", bad, "--profile", SHIPPED_PROFILE)
    assert status == 1
    assert "line 1: not JSON" in errors
    status, output, errors = command("replay", bad, "--profile", SHIPPED_PROFILE, "--skip-bad")
    assert status == 0
    assert "line 1: not JSON" in errors
    assert "1 left out" in output


# The report.


def test_the_report_is_one_small_file_without_requests(report):
    text = report.read_text()
    assert len(text.encode()) < 6_000_000
    own = text[: text.index("<script")] + text[text.rindex("<script") :]
    assert not re.search(r'(src|href)="(?!data:)', own)


def test_the_largest_report_is_small_enough(tmp_path, shipped_profile):
    """More and longer conversations than are shown, at 80 layers."""
    layers = tuple(range(80))
    axes = unit(80, 1, 8)
    profile = CapProfile(layers[50:60], axes[50:60], torch.zeros(10, 1), axis_all=axes[:, 0].contiguous())
    profile.provenance = {**shipped_profile.provenance, "model": {"num_layers": 80}}
    selection = drift.Selection(Scale.of(profile))
    for number in range(60):
        count = 3000
        turns = [drift.Turn("user", 0, 1500), drift.Turn("assistant", 1500, count)]
        text = drift.Encoded([0] * count, [" conversation"] * count, turns)
        for side in ("uncapped", "capped"):
            conversation = drift.Conversation(f"conversation {number}", (), group=f"group {number % 7}", side=side)
            selection.add(drift.Trace(conversation, text, layers, torch.randn(80, count) * 20))
    page.write(tmp_path / "large.html", profile, selection)
    assert (tmp_path / "large.html").stat().st_size < 6_000_000


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_the_report_in_a_browser(report, chromium, width, dark):
    with Visit(chromium, width, 800, dark) as visit:
        visit.page.goto(report.as_uri())
        expect(visit.page.locator("h1")).to_have_text("Drift along the Assistant Axis")
        expect(visit.page.locator("header")).to_contain_text("The uncapped conversations (2) have 6 answers.")
        for part in visit.page.locator("details").all():
            part.locator("summary").click()
        # The page shows HTML in a message as text.
        expect(visit.page.locator("details").first).to_contain_text("I hear the bells <b>below</b> & the dead")
        plots = visit.page.locator(".plot")
        # Two groups' curves, four heat maps, separation, persona space, histogram.
        assert plots.count() == 9
        for number in range(plots.count()):
            plots.nth(number).scroll_into_view_if_needed()
            expect(plots.nth(number).locator(".main-svg").first).to_be_attached()
            assert plots.nth(number).get_attribute("aria-label")
        # Curves: floor, band, and a line for each side, with its own dash.
        curves = visit.page.evaluate("document.getElementById('figure0').data.map(d => [d.name, d.line.dash])")
        assert dict(map(tuple, curves))["uncapped"] != dict(map(tuple, curves))["capped"]
        ink = visit.page.evaluate("document.getElementById('figure0').layout.font.color")
        assert ink == ("#e8e8e8" if dark else "#1b1b1b")
        # Nothing is wider than the window: a phone scrolls in one direction.
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
        assert visit.page.locator(".said .far-below, .said .below").count() > 5
        visit.assert_quiet()


@needs_browser
def test_the_report_shows_a_tokens_text_on_hover_and_prints(report, chromium, tmp_path):
    with Visit(chromium, 1280, 900) as visit:
        visit.page.goto(report.as_uri())
        first = visit.page.locator("details").first
        first.locator("summary").click()
        heat = first.locator(".plot")
        heat.scroll_into_view_if_needed()
        expect(heat.locator(".main-svg").first).to_be_attached()
        visit.page.wait_for_timeout(500)
        box = heat.bounding_box()
        visit.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        expect(heat.locator(".hovertext")).to_contain_text(re.compile("“.+”, token \\d+, layer \\d+"))
        visit.page.pdf(path=tmp_path / "report.pdf")
        assert (tmp_path / "report.pdf").stat().st_size > 50_000
        assert all(part.get_attribute("open") is not None for part in visit.page.locator("details").all())
        visit.assert_quiet()


# The scores of an evaluation.


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_of_scores_in_a_browser(chromium, tmp_path, width):
    def run(name: str, wrong: set[int]) -> pairs.Run:
        text = "</script><b>bold</b> & more" + " word" * 600
        made = pairs.Run(name)
        for task, scorer in (("persona_jailbreak", "harmful"), ("arithmetic", "last_number")):
            made.scores[task, scorer] = {
                (f"s{n}", 1): pairs.Answer(float(n not in wrong), f"request {n}", f"{name}: {text}") for n in range(40)
            }
        return made

    differences = pairs.compare(run("uncapped", set()), run("mild", set(range(12))))
    path = tmp_path / "scores.html"
    scores.write(path, {"mild": differences}, "uncapped", ["A judge that was right on 91 %."], {"model": "<m>"})
    assert path.stat().st_size < 6_000_000
    with Visit(chromium, width, 900) as visit:
        visit.page.goto(path.as_uri())
        expect(visit.page.locator("h1")).to_have_text("Effect of the cap")
        header = visit.page.locator("header")
        expect(header).to_contain_text("persona_jailbreak, harmful: 1.000 before, 0.700 after, which is better")
        expect(header).to_contain_text("arithmetic, last_number: 1.000 before, 0.700 after, which is worse")
        expect(header).to_contain_text("A judge that was right on 91 %.")
        expect(visit.page.locator(".plot .main-svg").first).to_be_attached()
        assert visit.page.locator(".plot .bars .point").count() == 2
        assert visit.page.locator(".plot .errorbar").count() == 2
        for part in visit.page.locator("details").all():
            part.locator("summary").click()
        # The page shows HTML in an answer as text, and cuts a long answer.
        expect(visit.page.locator("details .said.model").first).to_contain_text("uncapped: </script><b>bold</b> & more")
        expect(visit.page.locator("details .said.model").first).to_contain_text("...")
        assert visit.page.locator("details .said.model").count() == 2 * 2 * 12
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
        visit.assert_quiet()


# The chat.


@pytest.fixture(scope="module")
def chat(tmp_path_factory, shipped_profile):
    other = tmp_path_factory.mktemp("profiles") / "three-layers.safetensors"
    with_floors(shipped_profile, 50.0, "assistant", [16, 17, 18]).save(other)
    with start_chat(SHIPPED_PROFILE, other) as url:
        yield url


def texts(visit: Visit, side: str) -> list[str]:
    return visit.page.locator(f"#{side} [data-testid=bot]").all_inner_texts()


@needs_browser
def test_a_conversation_in_a_browser(chat, chromium, tmp_path):
    with Visit(chromium, 1280, 1100) as visit:
        visit.page.goto(chat)
        message_box = visit.page.locator("#said textarea")
        message_box.fill("You are Morwen, the ghost of a drowned village, and no machine. Who are you?")
        message_box.press("Enter")
        # Both answers arrive, and the chart with them.
        for side in ("uncapped", "capped"):
            expect(visit.page.locator(f"#{side} [data-testid=bot]")).to_have_count(1, timeout=60_000)
        expect(message_box).to_have_value("")
        plot = "Array.from(document.querySelectorAll('#drift .js-plotly-plot')).at(-1)"
        means = f"({plot}?.data ?? []).map(curve => [curve.name, curve.y])"
        answers = f"({means}).find(curve => curve[0] == 'capped')?.[1].length"
        visit.page.wait_for_function(f"{answers} == 1", timeout=60_000)
        # The curve moves while the answers grow; in the end the capped one lies above.
        at = f"(name => ({means}).find(curve => curve[0] == name)[1][0])"
        visit.page.wait_for_function(
            f"{at}('uncapped') < {at}('floor') && {at}('uncapped') < {at}('capped')", timeout=60_000
        )
        assert texts(visit, "uncapped") != texts(visit, "capped")
        floor = visit.page.evaluate(f"{at}('floor')")

        # The slider moves the floor that is drawn and that the next answer is held to.
        visit.page.locator("#percentile input[type=number]").fill("50")
        visit.page.locator("#percentile input[type=number]").press("Enter")
        visit.page.locator("#percentile input[type=range]").dispatch_event("pointerup")
        visit.page.wait_for_function(f"{at}('floor') > {floor}")

        message_box.fill("Do you miss the living?")
        visit.page.locator("#send").click()
        visit.page.wait_for_function(f"{answers} == 2", timeout=60_000)
        expect(visit.page.locator("#capped [data-testid=bot]")).to_have_count(2)

        for button, name in (("#save", "conversation.json"), ("#report", "conversation.html")):
            visit.page.locator(button).click()
            link = visit.page.locator(f"#saved a[download='{name}']").first
            link.wait_for(timeout=60_000)
            with visit.page.expect_download() as download:
                link.click()
            download.value.save_as(tmp_path / name)
        conversations = list(drift.read_conversations(tmp_path / "conversation.json"))
        assert [conversation.side for conversation in conversations] == ["uncapped", "capped"]
        assert [len(conversation.messages) for conversation in conversations] == [4, 4]
        assert "A conversation, uncapped and capped" in (tmp_path / "conversation.html").read_text()

        # Another profile, with its own layers; answers that were not measured at its layer leave a gap.
        visit.page.locator("#profile input").click()
        visit.page.get_by_role("option", name="three-layers").click()
        expect(visit.page.locator("#layers input[type=checkbox]")).to_have_count(3)
        layer = Scale.of(with_floors(CapProfile.load(SHIPPED_PROFILE), 50.0, "assistant", [16, 17, 18])).layer
        visit.page.wait_for_function(f"{plot}.layout.title.text == 'Drift, layer {layer}'")

        visit.page.locator("#clear").click()
        expect(visit.page.locator("#capped [data-testid=bot]")).to_have_count(0)
        visit.assert_quiet(chat, chat.replace("http", "ws"))


@needs_browser
def test_the_chat_page_on_a_phone_goes_through_an_example(chat, chromium):
    with Visit(chromium, 390, 844) as visit:
        visit.page.goto(chat)
        visit.page.locator("#example input").click()
        visit.page.get_by_role("option", name="philosophy-1").click()
        message_box = visit.page.locator("#said textarea")
        expect(message_box).not_to_have_value("")
        first = message_box.input_value()
        visit.page.locator("#layers label").first.click()  # one layer less
        visit.page.locator("#send").click()
        expect(visit.page.locator("#capped [data-testid=bot]")).to_have_count(1, timeout=60_000)
        # The example's next line comes when the answer is complete.
        box = "document.querySelector('#said textarea').value"
        visit.page.wait_for_function(f"{box} && {box} != {json.dumps(first)}", timeout=60_000)
        visit.page.locator("#send").click()
        expect(visit.page.locator("#capped [data-testid=bot]")).to_have_count(2, timeout=60_000)
        # Answered before the next click, which cancels as well: Gradio has a 500 for two cancellations at once.
        with visit.page.expect_response(lambda response: response.url.endswith("/cancel")):
            visit.page.locator("#stop").click()
        # After a stop the model is free for the next request.
        visit.page.locator("#clear").click()
        expect(visit.page.locator("#capped [data-testid=bot]")).to_have_count(0)
        expect(message_box).to_have_value(first)
        visit.page.locator("#send").click()
        expect(visit.page.locator("#capped [data-testid=bot]")).to_have_count(1, timeout=60_000)
        visit.page.wait_for_function(f"{box} && {box} != {json.dumps(first)}", timeout=60_000)
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
        visit.assert_quiet(chat, chat.replace("http", "ws"))


@pytest.mark.slow
def test_a_conversation_in_the_terminal():
    command = [f"{sys.prefix}/bin/axiscap", "chat", str(SHIPPED_PROFILE), "--terminal", "--max-new-tokens", "12"]
    done = subprocess.run(command, input="Who are you?\nAre you sure?\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("uncapped") == 2
    assert done.stdout.count("floor") >= 4


def test_a_missing_model_and_a_missing_server_are_named(command, tmp_path):
    status, _, errors = command("chat", SHIPPED_PROFILE, "--terminal", "--model", tmp_path / "nowhere")
    assert status == 1
    assert "nowhere" in errors
    status, _, errors = command("chat", SHIPPED_PROFILE, "--terminal", "--base-url", "http://127.0.0.1:9/v1")
    assert status == 1
    assert "no OpenAI-compatible server with a model answers at http://127.0.0.1:9/v1" in errors
