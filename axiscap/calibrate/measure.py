"""The tables of a profile whose axis is known, from ordinary work: no roles take part."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

import torch
from torch import Tensor

import axiscap
from axiscap.calibrate.pipeline import (
    CollectSketches,
    Progress,
    describe_model,
    describe_sampling,
    describe_template,
    ordinary_texts,
    profile_without_floors,
    sketch_work,
)
from axiscap.calibrate.roles import Plan
from axiscap.calibrate.rollouts import Here, TransformersEngine
from axiscap.calibrate.sinks import find_norm_limits
from axiscap.calibrate.sketch import describe
from axiscap.calibrate.space import Directions
from axiscap.calibrate.store import Store
from axiscap.calibrate.work import Work
from axiscap.calibrate.work import answer as answer_work
from axiscap.models import decoder_layers
from axiscap.profile import CapProfile
from axiscap.profile.fit import ModelFacts, check_fits

#: How many requests are answered, and the most tokens of an answer.
REQUESTS, TOKENS = 160, 100


def measure(
    model: Any,
    tokenizer: Any,
    profile: CapProfile,
    plan: Plan,
    store: Store,
    work: Work,
    *,
    progress: Progress = lambda label, done, total: None,
) -> CapProfile:
    """The profile with tables of this model: ordinary tokens, answers to ordinary work, and norm limits.

    It is for an axis without floors, and for a profile whose model has changed: a fine-tune, an adapter, or quantised
    weights. The axes stay.

    Parameters
    ----------
    model
        a transformers causal LM in evaluation mode.
    tokenizer
        its tokenizer.
    profile
        with one direction at each layer.
    plan
        gives prompts of roles for the norm limits; none is answered.
    store
        keeps the answers.
    work
        ordinary work, of which a sample is answered.
    progress
        called with the name of the step, how many items it finished since the last call, and how many there are.

    Returns
    -------
    CapProfile
        Without floors, for :func:`with_floors`. Layers without an axis have an axis of zeros.

    Raises
    ------
    ValueError
        the profile has several directions, or does not fit the model.

    Examples
    --------
    >>> from axiscap import calibrate
    >>> plan = calibrate.plan(calibrate.load_roles(), calibrate.load_questions(), per_role=1)
    >>> store = calibrate.Store(str(folder / "answers"), calibrate.Settings("SmolLM2-135M", "float32"))
    >>> measured = calibrate.measure(model, tokenizer, profile, plan, store, calibrate.load_work())  # doctest: +SKIP
    """
    if profile.directions != 1:
        raise ValueError(f"a profile must have one direction a layer to be measured, got {profile.directions}")
    facts = describe_model(model, store.settings.model)
    depth = len(decoder_layers(model))
    check_fits("to measure", profile, ModelFacts(depth, facts["hidden_size"], ()), allow_other_model=True)
    sample = work.sample(REQUESTS, TOKENS)
    limits = find_norm_limits(model, tokenizer, plan, store, sample)
    store = Store(store.url, dataclasses.replace(store.settings, norm_limits=limits.limits))
    workers = Here(TransformersEngine(model, tokenizer, store.settings))
    answer_work(sample, workers, store, lambda done: progress("answers to ordinary work", done, sample.answers))
    axis = _at_every_layer(profile, profile.axis_all, profile.axes, depth)
    texts = ordinary_texts(sample, store, tokenizer)
    tokens = workers.over_texts(
        CollectSketches(axis, limits.limits), store, [texts], lambda done: progress("texts", done, len(texts))
    )
    (sketches,) = tokens
    tables = {"work": sketch_work(sample, store, axis), "ordinary tokens": sketches["ordinary tokens"]}
    kept = {name: value for name, value in profile.provenance.items() if name not in ("sinks", "floors", "evidence")}
    provenance = kept | {
        "model": {**profile.model_facts, **facts},
        "quantiles": describe(tables),
        "template": describe_template(model, tokenizer, sample, store.settings, axis),
        "sampling": describe_sampling(dataclasses.replace(store.settings, max_new_tokens=TOKENS)),
        "measured": {
            "requests": sample.answers,
            "digest": work.digest,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        },
        "axiscap": axiscap.__version__,
    }
    lift = None if profile.lifts is None else _at_every_layer(profile, profile.lift_all, profile.lifts, depth)
    return profile_without_floors(list(profile.layers), Directions(axis, lift), limits, tables, provenance)


def _at_every_layer(profile: CapProfile, stored: Tensor | None, capped: Tensor, depth: int) -> Tensor:
    """(n_layers, H): vectors at every layer, zeros where only the capped layers have some."""
    if stored is not None:
        return stored
    vectors = torch.zeros(depth, profile.hidden_size)
    vectors[list(profile.layers)] = capped[:, 0]
    return vectors
