"""Drift statistics, and the monitor with its metrics."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import threading
import urllib.request

import prometheus_client
import pytest
import torch
import yaml
from conftest import REPOSITORY, unit
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import axiscap
from axiscap import CapProfile, drift
from axiscap.drift import Conversation, Monitor, Scale
from axiscap.profile.scale import BUCKETS

# Drift statistics.


def test_a_percentile_is_interpolated_in_the_table(shipped_profile):
    scale = Scale.of(shipped_profile)
    assert scale.layer in shipped_profile.layers
    for rank, value in zip(scale.ranks, scale.values, strict=True):
        assert scale.percentile(value) == pytest.approx(rank, abs=1e-6)
    assert scale.percentile(scale.values[0] - 1) == 0
    assert scale.percentile(scale.values[-1] + 1) == 100
    between = (scale.values[9] + scale.values[10]) / 2
    assert scale.percentile(between) == pytest.approx((scale.ranks[9] + scale.ranks[10]) / 2)
    bare = CapProfile([2], unit(1, 1, 8), torch.zeros(1, 1))
    assert math.isnan(Scale.of(bare).percentile(0.0))
    assert drift.describe_percentile(1.0) == "below 99 % of normal answers"
    assert drift.describe_percentile(0.0) == "below more than 99.5 % of normal answers"
    assert drift.describe_percentile(60.0) == "above 60 % of normal answers"


@given(st.lists(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=9), min_size=1, max_size=9))
def test_the_statistics_equal_their_definitions(turns):
    profile = CapProfile([0], unit(1, 1, 8), torch.tensor([[1.5]]))
    spans = [drift.Turn("user", 0, 0)]
    start = 0
    for turn in turns:
        spans.append(drift.Turn("assistant", start, start + len(turn)))
        start += len(turn)
    flat = torch.tensor([[value for turn in turns for value in turn]])
    trace = drift.Trace(Conversation("t", ()), drift.Encoded([0] * start, [""] * start, spans), (0,), flat)
    path = trace.drift(Scale.of(profile))
    means = torch.tensor([torch.tensor(turn, dtype=torch.float64).mean() for turn in turns], dtype=torch.float64)
    assert (path.turns, path.tokens) == (len(turns), start)
    assert path.level == pytest.approx(means.mean().item(), abs=1e-6)
    assert path.lowest == pytest.approx(means.min().item())
    assert means[path.lowest_turn - 1] == means.min()
    assert path.below == pytest.approx((flat < 1.5).double().mean().item())
    if len(turns) == 1:
        assert math.isnan(path.slope)
    else:
        x = torch.arange(1, len(turns) + 1, dtype=torch.float64)
        slope = ((x - x.mean()) * (means - means.mean())).sum() / ((x - x.mean()) ** 2).sum()
        assert path.slope == pytest.approx(slope.item(), abs=1e-5)


def test_a_conversation_without_answers_has_no_drift():
    trace = drift.Trace(
        Conversation("t", ()), drift.Encoded([1], ["x"], [drift.Turn("user", 0, 1)]), (0,), torch.ones(1, 1)
    )
    assert trace.drift(Scale(0, 0.0, (), ())) is None


# The monitor.


def test_an_alarm_ends_only_above_the_high_percentile(shipped_profile):
    changes = []
    monitor = Monitor(shipped_profile, low=5, high=20, on_change=lambda *change: changes.append(change[:2]))
    value = dict(zip(monitor.scale.ranks, monitor.scale.values, strict=True))
    for percentile, drifts in ((50, False), (6, False), (4, True), (6, True), (19, True), (21, False), (6, False)):
        monitor.turn("a", torch.full((3,), value[float(percentile)]))
        assert monitor.drifting == drifts, percentile
    assert changes == [("a", True), ("a", False)]
    monitor.turn("b", torch.tensor([value[1.0]]))
    assert (monitor.drifting, monitor.alarms) == (1, 2)
    assert monitor.drift("a").turns == 7
    assert monitor.drift("nobody") is None
    with pytest.raises(ValueError, match="low <= high"):
        Monitor(shipped_profile, low=30, high=20)
    with pytest.raises(ValueError, match="at least one finite projection"):
        monitor.turn("a", torch.tensor([math.nan]))
    with pytest.raises(ValueError, match="no quantiles of normal answers"):
        Monitor(CapProfile([2], unit(1, 1, 8), torch.zeros(1, 1)))


def test_the_conversation_without_turns_for_longest_is_forgotten(shipped_profile):
    monitor = Monitor(shipped_profile, most=3)
    low = torch.tensor([monitor.scale.values[0] - 1])
    for name in ("a", "b", "c", "a", "d"):
        monitor.turn(name, low)
    assert monitor.drift("b") is None
    assert monitor.drift("a").turns == 2
    assert monitor.drifting == 3


def test_a_record_of_a_server_is_a_turn(shipped_profile):
    monitor = Monitor(shipped_profile)
    counts = {"rows": 7, "fired": 3, "mean_projection": [-4.5], "mean_shortfall": [1.0]}
    layers = {str(layer): counts for layer in shipped_profile.layers}
    path = monitor.record("c", {"id": "r", "name": "p", "layers": layers, "answer": layers})
    assert (path.turns, path.tokens, path.level, path.below) == (1, 7, -4.5, pytest.approx(3 / 7))
    empty = {"answer": {key: {**value, "rows": 0, "mean_projection": [None]} for key, value in layers.items()}}
    assert monitor.record("c", empty) is None
    for record in ({}, {"answer": {}}, {"answer": {str(monitor.scale.layer): 3}}, {"answer": None}):
        with pytest.raises(ValueError, match="must be of a finished request"):
            monitor.record("c", record)


def test_metrics_survive_a_scrape_under_load(shipped_profile):
    registry = prometheus_client.CollectorRegistry()
    monitor = Monitor(shipped_profile, name="strict", most=100)
    monitor.register(registry)
    server, thread = prometheus_client.start_http_server(0, addr="127.0.0.1", registry=registry)
    url = f"http://127.0.0.1:{server.server_port}/metrics"
    stop = threading.Event()

    def load() -> None:
        number = 0
        while not stop.is_set():
            monitor.turn(f"c{number % 300}", torch.randn(5) * 30)
            number += 1

    worker = threading.Thread(target=load)
    worker.start()
    try:
        pages = [urllib.request.urlopen(url).read().decode() for _ in range(30)]
    finally:
        stop.set()
        worker.join()
        server.shutdown()
        thread.join()
    families = {family.name: family for family in text_string_to_metric_families(pages[-1])}
    assert set(families) == {
        f"axiscap_monitor_{name}"
        for name in ("turns", "tokens", "tokens_below_floor", "alarms", "conversations", "drifting_conversations",
                     "turn_percentile")
    }  # fmt: skip
    for family in families.values():
        assert family.documentation.endswith(".")
        assert all(sample.labels["profile"] == "strict" for sample in family.samples)
        assert {key for sample in family.samples for key in sample.labels} <= {"profile", "le"}
    histogram = families["axiscap_monitor_turn_percentile"].samples
    counts = [sample.value for sample in histogram if sample.name.endswith("_bucket")]
    assert counts == sorted(counts)
    assert counts[-1] == next(sample.value for sample in histogram if sample.name.endswith("_count"))
    assert families["axiscap_monitor_conversations"].samples[0].value == 100


@pytest.fixture
def scraped(shipped_profile, tmp_path) -> set[str]:
    """The names of all samples on a page with the metrics of a server and a monitor."""
    from axiscap.serving.front.metrics import Totals
    from axiscap.serving.shared_folder import WRITTEN

    totals = {"rows": 5.0, "fired": 1.0, "nonfinite": 0.0, "projection": -3.0, "shortfall": 2.0}
    answers = {"strict": {"counts": [1] * len(BUCKETS), "sum": 300.0}}
    written = {"profiles": {"strict": {"answer": {"14": totals}}}, "answers": answers}
    (tmp_path / "totals-0.json").write_text(json.dumps({**written, "failures": dict.fromkeys(WRITTEN, 0), "lost": 0}))
    registry = prometheus_client.CollectorRegistry()
    registry.register(Totals(tmp_path))
    Monitor(shipped_profile).register(registry)
    page = prometheus_client.generate_latest(registry).decode()
    return {sample.name for family in text_string_to_metric_families(page) for sample in family.samples}


def test_the_dashboard_uses_existing_metrics_only(scraped):
    board = json.loads((REPOSITORY / "examples" / "grafana.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    used = {name for expression in expressions for name in re.findall(r"axiscap_\w+", expression)}
    assert used <= scraped
    assert len(used) >= 8
    for panel in board["panels"]:
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_alerts_use_existing_metrics_only(scraped):
    (group,) = yaml.safe_load((REPOSITORY / "examples" / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]:
        used = set(re.findall(r"axiscap_\w+", rule["expr"]))
        assert used
        assert used <= scraped
        assert rule["annotations"]["summary"]


def test_the_alerts_fire_as_their_own_tests_say():
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is missing: apt install prometheus")
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        process = subprocess.run([promtool, *command], cwd=REPOSITORY / "examples", capture_output=True, text=True)
        assert process.returncode == 0, process.stdout + process.stderr


def test_watching_ends_when_the_returned_function_is_called(demo_model, shipped_profile):
    model, _ = demo_model
    passes = []
    with axiscap.install(model, shipped_profile) as cap, torch.inference_mode():
        stop_watching = cap.watch(passes.append)
        model(torch.tensor([[1, 2, 3]]))
        stop_watching()
        model(torch.tensor([[1, 2, 3]]))
    assert len(passes) == 1
    assert set(passes[0]) == set(shipped_profile.layers)
