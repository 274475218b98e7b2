"""Capping while a model learns, so that what it learns does not move it along the axis (the extra ``axiscap[train]``).

The profile is in force in the forward and backward passes of training steps, with gradients through the cap, and not in
evaluation. :func:`attach` does it for transformers' ``Trainer`` and what derives from it (TRL's ``SFTTrainer``,
``DPOTrainer``), :class:`TrainingCap` for a loop of one's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from axiscap.calibrate.data import shipped
from axiscap.calibrate.floors import PERCENTILES, with_floors
from axiscap.profile import CapProfile
from axiscap.stats import layer_stats, target_gap
from axiscap.transformers import install

try:
    from transformers import TrainerCallback
except ModuleNotFoundError:
    raise ModuleNotFoundError("capping in training needs transformers: pip install 'axiscap[train]'") from None

_CAP, _WATCH = "cap", "watch"
_PROBES_AT_ONCE = 16


class TrainingCap:
    """A profile that is in force in a model's training steps.

    Parameters
    ----------
    model
        a transformers causal language model, also with PEFT's adapters, compiled, or sharded by FSDP.
    profile
        the profile.
    every
        of how many steps one is capped; the others are not, whatever holds outside of steps.
    rise
        over what share of the run the floors rise, from the lowest percentile that the profile's table has of
        their population to where the profile has them; 0: they are there from the beginning.
    in_evaluation
        whether passes outside of steps are capped as well.
    probes
        texts whose mean projections :meth:`figures` tells, uncapped; without them, the first lines of AxisCap's
        own conversations that drift. With a chat template they are a user's messages.
    tokenizer
        encodes the probes; without it there are none.
    allow_other_model
        as for :func:`axiscap.install`.

    Raises
    ------
    ValueError
        every or rise is out of range, the profile does not fit, or has no table for its floors to rise in.

    Examples
    --------
    >>> from axiscap.training import TrainingCap
    >>> cap = TrainingCap(model, profile, probes=[])
    >>> with cap.step(0, 100):
    ...     loss = model(**inputs, labels=inputs["input_ids"]).loss
    >>> cap.remove()
    """

    def __init__(
        self,
        model: Any,
        profile: CapProfile,
        *,
        every: int = 1,
        rise: float = 0.0,
        in_evaluation: bool = False,
        probes: Sequence[str] | None = None,
        tokenizer: Any = None,
        allow_other_model: bool = False,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if not 0 <= rise <= 1:
            raise ValueError(f"rise must be from 0 to 1, got {rise}")
        self._low = None
        if rise:
            population = profile.population
            if population is None:
                raise ValueError(
                    "the profile does not say whose projections its floors are of, so that they cannot rise"
                )
            self._low = with_floors(profile, PERCENTILES[0], population, list(profile.layers)).floors
        self.profile, self._every, self._rise = profile, every, rise
        self._model = model
        self._device = next(model.parameters()).device
        self._outside = _CAP if in_evaluation else None
        if probes is None:
            probes = [entry["turns"][0] for entry in shipped("drift.jsonl") if entry["group"] == "drift"]
        self._probes = [] if tokenizer is None else _encoded(tokenizer, probes)
        profiles = {_CAP: profile, _WATCH: profile.measuring_only()}
        self.installation = install(model, profiles, allow_other_model=allow_other_model)
        self.installation.select(self._outside)

    def begin(self, step: int, steps: int) -> None:
        """Before the passes of an optimizer's step, all of those whose gradients it adds up.

        Parameters
        ----------
        step
            its number, from 0.
        steps
            how many the run has.

        Examples
        --------
        >>> from axiscap.training import TrainingCap
        >>> cap = TrainingCap(model, profile, probes=[])
        >>> cap.begin(0, 100)
        >>> _ = model(**inputs)
        >>> cap.end()
        >>> cap.remove()
        """
        if self._low is not None:
            share = min(1.0, step / max(1.0, self._rise * steps))
            self.installation.set_floors(torch.lerp(self._low, self.profile.floors, share), _CAP)
        self.installation.reset_stats()
        self.installation.select(_CAP if step % self._every == 0 else None)

    def end(self) -> None:
        """Behind the step's backward passes.

        Examples
        --------
        >>> from axiscap.training import TrainingCap
        >>> cap = TrainingCap(model, profile, probes=[])
        >>> cap.begin(0, 100)
        >>> cap.end()
        >>> cap.remove()
        """
        self.installation.select(self._outside)

    @contextlib.contextmanager
    def step(self, step: int, steps: int) -> Iterator[None]:
        """Both: ``with cap.step(number, steps): loss = model(**batch).loss; loss.backward()``.

        Parameters
        ----------
        step
            its number, from 0.
        steps
            how many the run has.

        Yields
        ------
        None
            While the step's passes run.

        Examples
        --------
        >>> from axiscap.training import TrainingCap
        >>> cap = TrainingCap(model, profile, probes=[])
        >>> with cap.step(0, 100):
        ...     loss = model(**inputs, labels=inputs["input_ids"]).loss
        >>> cap.remove()
        """
        self.begin(step, steps)
        try:
            yield
        finally:
            self.end()

    def remove(self) -> None:
        """Takes the capping out: the model is as it was, with what it learnt.

        Examples
        --------
        >>> from axiscap.training import TrainingCap
        >>> TrainingCap(model, profile, probes=[]).remove()
        """
        self.installation.remove()

    def figures(self) -> dict[str, float]:
        """Of the last step, by capped layer: the share of rows that fired (``axiscap/fired/14``), how far those below
        the floor lay from it (``axiscap/shortfall/14``), and what was added to their projections
        (``axiscap/added/14``); and the probes' mean projection as the model is now, uncapped (``axiscap/probes/14``).
        Summed over processes, where several train.

        Returns
        -------
        dict[str, float]
            By what a trainer would log.

        Examples
        --------
        >>> from axiscap.training import TrainingCap
        >>> cap = TrainingCap(model, profile, probes=[])
        >>> with cap.step(0, 100):
        ...     _ = model(**inputs)
        >>> f"axiscap/fired/{profile.layers[0]}" in cap.figures()
        True
        >>> cap.remove()
        """
        layers = self.installation._layers
        sums = torch.stack([layers[index].stats[0] for index in self.profile.layers])
        found: dict[str, float] = {}
        for index, stats in zip(self.profile.layers, _over_processes(sums), strict=True):
            directions = self.profile.directions
            gap = target_gap(self.profile, index, directions)
            seen = layer_stats(stats[:directions], gap, self.profile.strength)
            if seen.rows:
                found[f"axiscap/fired/{index}"] = seen.fired / seen.rows
                if seen.fired:
                    found[f"axiscap/shortfall/{index}"] = seen.mean_shortfall[0]
                    found[f"axiscap/added/{index}"] = seen.mean_added[0]
        return found | self._probed()

    def _probed(self) -> dict[str, float]:
        if not self._probes:
            return {}
        cap, model = self.installation, self._model
        was_training, sums = model.training, {layer: [0.0, 0.0] for layer in self.profile.layers}
        model.eval()
        cap.select(_WATCH)
        try:
            for at in range(0, len(self._probes), _PROBES_AT_ONCE):
                ids, mask = _padded(self._probes[at : at + _PROBES_AT_ONCE], self._device)
                with torch.no_grad():
                    model(input_ids=ids, attention_mask=mask)
                for layer, projections in cap.projections().items():
                    known = projections[..., 0][projections[..., 0].isfinite()]
                    sums[layer][0] += known.double().sum().item()
                    sums[layer][1] += known.numel()
        finally:
            cap.select(self._outside)
            model.train(was_training)
        return {f"axiscap/probes/{layer}": total / count for layer, (total, count) in sums.items() if count}


def attach(
    trainer: Any,
    profile: CapProfile,
    *,
    every: int = 1,
    rise: float = 0.0,
    in_evaluation: bool = False,
    probes: Sequence[str] | None = None,
    allow_other_model: bool = False,
) -> CapCallback:
    """Has a trainer cap its training steps, and log what it did, beside its own figures, to whatever it reports to.

    The arguments are those of :class:`TrainingCap`. What the trainer saves knows nothing of it; a run that is resumed
    attaches it again.

    Parameters
    ----------
    trainer
        a transformers ``Trainer``, or one of TRL's.
    profile
        the profile.
    every
        of how many steps one is capped.
    rise
        over what share of the run the floors rise.
    in_evaluation
        whether passes outside of steps are capped as well.
    probes
        texts whose mean projections are logged.
    allow_other_model
        as for :func:`axiscap.install`.

    Returns
    -------
    CapCallback
        The callback, whose ``cap`` is the :class:`TrainingCap` while the trainer trains. It takes the capping out when
        training ends; where that ends in an error, ``remove()`` does.

    Examples
    --------
    >>> from axiscap import training
    >>> callback = training.attach(trainer, profile, probes=[])
    >>> trainer.remove_callback(callback)
    """
    options = {"every": every, "rise": rise, "in_evaluation": in_evaluation, "probes": probes}
    options["allow_other_model"] = allow_other_model
    callback = CapCallback(profile, trainer.processing_class, options)
    # In front of those that report: what it adds to a log is there when they see it.
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback


class CapCallback(TrainerCallback):  # type: ignore[misc]
    """What :func:`attach` adds to a trainer.

    Examples
    --------
    >>> from axiscap import training
    >>> callback = training.attach(trainer, profile, probes=[])
    >>> isinstance(callback, training.CapCallback)
    True
    >>> trainer.remove_callback(callback)
    """

    def __init__(self, profile: CapProfile, tokenizer: Any, options: dict[str, Any]) -> None:
        self.cap: TrainingCap | None = None
        self._profile, self._tokenizer, self._options = profile, tokenizer, options

    def remove(self) -> None:
        """Takes the capping out, if it is there.

        Examples
        --------
        >>> from axiscap import training
        >>> callback = training.attach(trainer, profile, probes=[])
        >>> callback.remove()
        >>> trainer.remove_callback(callback)
        """
        if self.cap is not None:
            self.cap.remove()
        self.cap = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.remove()  # of a run that ended in an error
        self.cap = TrainingCap(model, self._profile, tokenizer=self._tokenizer, **self._options)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.cap is not None
        self.cap.begin(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.cap is not None
        self.cap.end()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.cap is None or logs is None or "loss" not in logs:
            return
        figures = self.cap.figures()
        logs.update(figures)
        state.log_history[-1].update(figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.remove()


def _over_processes(sums: Tensor) -> Tensor:
    """Statistics (L, K, F) of all processes; least and largest are this one's."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        sums = sums.clone()
        torch.distributed.all_reduce(sums)
    return sums


def _encoded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    if not getattr(tokenizer, "chat_template", None):
        return [tokenizer(text)["input_ids"] for text in texts]
    said = [[{"role": "user", "content": text}] for text in texts]
    return [
        tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        for turns in said
    ]


def _padded(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(texts, longest) each: ids, and which of them are tokens; on the right, where no position moves."""
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=device)
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts], device=device)
    return ids, mask
