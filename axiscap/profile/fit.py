"""The check that a profile fits a model, for every engine."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from axiscap.profile.record import CapProfile


@dataclass(frozen=True)
class ModelFacts:
    """The facts of a model that a profile is compared with.

    Parameters
    ----------
    num_layers
        The decoder layers of the whole model.
    hidden_size
        H, or None if it is unknown.
    families
        The normalised names of the architecture (:func:`family`); empty if it is unknown. Wrappers of one language
        model have several.
    """

    num_layers: int
    hidden_size: int | None
    families: tuple[str, ...] = ()

    @classmethod
    def of(cls, num_layers: int, hidden_size: int | None, names: Iterable[object]) -> ModelFacts:
        """The facts of a model, whose architecture has ``names``: of classes, or transformers' ``model_type``."""
        return cls(num_layers, hidden_size, tuple(sorted({family(name) for name in names if isinstance(name, str)})))

    @classmethod
    def of_configs(
        cls, num_layers: int, hidden_size: int | None, *configs: Any, names: Iterable[object] = ()
    ) -> ModelFacts:
        """The same, with the names in configurations of transformers, outer and inner ones."""
        types = [getattr(config, "model_type", None) for config in configs]
        classes = [name for config in configs for name in getattr(config, "architectures", None) or ()]
        return cls.of(num_layers, hidden_size, [*names, *types, *classes])


def family(name: str) -> str:
    """The part of a name that all classes and types of an architecture share: ``llama`` for LlamaForCausalLM."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"(For[A-Z]\w*|LMHeadModel|Model|_text)$", "", name).lower())


def check_fits(name: str, profile: CapProfile, model: ModelFacts, *, allow_other_model: bool = False) -> None:
    """Checks that a profile is for a model.

    A fine-tuned model has the architecture of its base, and passes. Facts that the profile does not state are not
    checked (:func:`unstated`).

    Parameters
    ----------
    name
        of the profile, for messages.
    allow_other_model
        accepts a profile of another architecture. Its sizes must fit all the same.

    Raises
    ------
    ValueError
        The profile is for another model; the message says how they differ.
    """
    if model.hidden_size is not None and profile.hidden_size != model.hidden_size:
        raise ValueError(f"profile {name!r} has hidden size {profile.hidden_size}, the model {model.hidden_size}")
    if profile.layers[-1] >= model.num_layers:
        raise ValueError(
            f"profile {name!r} caps layer {profile.layers[-1]}, but the model has {model.num_layers} layers"
        )
    if profile.num_layers is not None and profile.num_layers != model.num_layers:
        raise ValueError(
            f"profile {name!r} is for a model of {profile.num_layers} layers, this one has {model.num_layers}"
        )
    stated = profile.architecture
    if stated is not None and model.families and family(stated) not in model.families and not allow_other_model:
        raise ValueError(
            f"profile {name!r} was made for {stated}, and this model is of another architecture "
            f"({', '.join(model.families)}); its axis means nothing here, unless you know better: allow_other_model"
        )


def unstated(profile: CapProfile) -> list[str]:
    """The facts that a profile does not state, and :func:`check_fits` cannot compare."""
    facts = {"architecture": profile.architecture, "layer count": profile.num_layers}
    return [name for name, value in facts.items() if value is None]
