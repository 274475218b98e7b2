"""The tests that take an hour: the documented command makes the shipped profile again, and the profile keeps its
promises on ordinary work. ``make nightly`` runs them, and resumes an interrupted run.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from axiscap import CapProfile, models
from axiscap import calibrate as calibration
from axiscap.calibrate import sweep
from axiscap.calibrate.effects import OWN, Point, Setting

REPOSITORY = Path(__file__).parents[1]
OUT = REPOSITORY / "out" / "nightly"
#: The default of `axiscap calibrate`, and the number of `axiscap sweep` in docs/calibration.md.
PER_ROLE, QUESTIONS = 16, 8


@pytest.fixture(scope="module")
def shipped() -> CapProfile:
    return CapProfile.load(REPOSITORY / "examples" / "profiles" / "smollm2-135m-instruct.safetensors")


@pytest.fixture(scope="module")
def remade() -> CapProfile:
    profile = OUT / "made.safetensors"
    program = Path(sys.executable).with_name("axiscap")
    command = [str(program), "calibrate", str(profile), "--rollouts", str(OUT / "rollouts")]
    subprocess.run(command, check=True)
    return CapProfile.load(profile)


@pytest.fixture(scope="module")
def points(shipped, remade) -> tuple[Point, Point]:
    """The points of the uncapped model and of the shipped profile."""
    model, tokenizer = models.load(models.DEFAULT_MODEL, "float32")
    roles = calibration.load_roles(model_name=models.DEFAULT_MODEL)
    plan = calibration.plan(roles, calibration.load_questions(), PER_ROLE)
    settings = calibration.Settings.of(remade, models.DEFAULT_MODEL)
    store = calibration.Store(str(OUT / "rollouts"), settings)
    judge = sweep.UptakeJudge(store.shards(calibration.batches(plan)), plan)
    bench = sweep.Bench(model, tokenizer, plan, settings, judge, store, QUESTIONS, calibration.load_work())
    floors = shipped.provenance["floors"]
    setting = Setting(shipped.layers[0], shipped.layers[-1], floors["percentile"], floors.get("target_percentile"))
    runs = sweep.Sweep(bench, shipped, floors["population"], OUT / f"{shipped.digest}.points.jsonl")
    return runs.tested(None), runs.tested(setting)


def test_the_command_makes_the_shipped_profile(shipped, remade):
    assert remade.layers == shipped.layers
    for name in ("axes", "lifts"):
        cosines = torch.nn.functional.cosine_similarity(getattr(remade, name), getattr(shipped, name), dim=-1)
        assert cosines.min() > 0.98, name
    scale = remade.floors.abs().mean()
    assert (remade.floors - shipped.floors).abs().max() < 0.25 * scale


def test_personas_are_held(points):
    uncapped, capped = points
    assert capped.tests.uptake <= 0.2 * uncapped.tests.uptake
    assert capped.hold >= 10 / 19 * uncapped.hold


def test_ordinary_work_costs_nothing_that_shows(points):
    uncapped, capped = points
    assert capped.worst[1] <= 1.025, capped.worst  # plain prose included
    assert capped.worst_fiction[1] <= 1.09, capped.worst_fiction
    assert capped.domains[OWN].perplexity <= 1.02  # the answers to the roles' questions
    # Of twelve answers, a fall by five or more is not chance (a one-sided sign test at 5 %).
    assert capped.tests.checks[0] > uncapped.tests.checks[0] - 5


def test_a_thousand_imports_succeed():
    """Each child of a process that has loaded torch imports the ops and calls one."""
    script = """
        import os, torch
        failed = 0
        for _ in range(1000):
            child = os.fork()
            if child == 0:
                from axiscap import ops
                rows = ops.cap_(torch.zeros(2, 8), torch.full((1, 1, 8), 8 ** -0.5), torch.ones(1, 1))
                os._exit(not rows.all())
            failed += os.waitpid(child, 0)[1] != 0
        print(failed)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "0\n"
