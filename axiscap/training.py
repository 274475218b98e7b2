"""Capping during training, so that a model does not learn to move along the axis (the extra ``axiscap[train]``).

The profile is in force in the forward and backward passes of training steps, with gradients through the cap, and not in
evaluation. :func:`attach` puts it into a ``Trainer`` of transformers or TRL, :class:`TrainingCap` into another loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from axiscap.data.jsonl import shipped
from axiscap.profile import CapProfile
from axiscap.profile.floors import PERCENTILES, with_floors
from axiscap.transformers import install

try:
    from transformers import TrainerCallback
except ModuleNotFoundError:
    raise ModuleNotFoundError("capping in training needs transformers: pip install 'axiscap[train]'") from None

#: The names of the profile, and of the same profile without floors, which reads the probes.
_CAP, _MEASURE = "cap", "measure"
_PROBES_PER_BATCH = 16


class TrainingCap:
    """A profile that is in force in a model's training steps.

    Parameters
    ----------
    model
        a transformers causal language model, also with PEFT's adapters, compiled, or sharded by FSDP.
    profile
        the profile.
    every
        caps one of so many steps.
    rise
        the share of the run during which the floors rise, from the lowest percentile in the profile's table of their
        population to the profile's floors; 0: they do not rise.
    in_evaluation
        whether passes outside of steps are capped.
    probes
        texts whose mean projections are read uncapped, for :meth:`figures`; by default the first lines of AxisCap's
        own conversations that drift. With a chat template they are messages of a user.
    tokenizer
        encodes the probes; without it there are no probes.
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
        self._lowest_floors = None
        if rise:
            population = profile.population
            if population is None:
                raise ValueError(
                    "the profile does not say whose projections its floors are of, so that they cannot rise"
                )
            self._lowest_floors = with_floors(profile, PERCENTILES[0], population, list(profile.layers)).floors
        self.profile, self._every, self._rise = profile, every, rise
        self._model = model
        self._device = next(model.parameters()).device
        self._outside = _CAP if in_evaluation else None
        if probes is None:
            probes = [entry["turns"][0] for entry in shipped("drift.jsonl") if entry["group"] == "drift"]
        self._probes = [] if tokenizer is None else _encode(tokenizer, probes)
        profiles = {_CAP: profile, _MEASURE: profile.measuring_only()}
        self.installation = install(model, profiles, allow_other_model=allow_other_model)
        self.installation.select(self._outside)

    def begin(self, step: int, steps: int) -> None:
        """Begins an optimizer's step, before the first of the passes whose gradients it adds up.

        Parameters
        ----------
        step
            the number of the step, from 0.
        steps
            the number of steps of the run.

        Examples
        --------
        >>> from axiscap.training import TrainingCap
        >>> cap = TrainingCap(model, profile, probes=[])
        >>> cap.begin(0, 100)
        >>> _ = model(**inputs)
        >>> cap.end()
        >>> cap.remove()
        """
        if self._lowest_floors is not None:
            share = min(1.0, step / max(1.0, self._rise * steps))
            self.installation.set_floors(torch.lerp(self._lowest_floors, self.profile.floors, share), _CAP)
        self.installation.reset_stats()
        self.installation.select(_CAP if step % self._every == 0 else None)

    def end(self) -> None:
        """Ends the step, after its backward passes.

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
        """:meth:`begin` and :meth:`end` as a context: ``with cap.step(number, steps): model(**batch).loss.backward()``.

        Parameters
        ----------
        step
            the number of the step, from 0.
        steps
            the number of steps of the run.

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
        """Takes the capping out, and leaves the model as it was, with what it learnt.

        Examples
        --------
        >>> from axiscap.training import TrainingCap
        >>> TrainingCap(model, profile, probes=[]).remove()
        """
        self.installation.remove()

    def figures(self) -> dict[str, float]:
        """The figures of the last step, by capped layer, summed over the processes that train.

        ``axiscap/fired/14`` is the share of rows that fired at layer 14; ``axiscap/shortfall/14`` is the mean distance
        to the floor of the rows below it, and ``axiscap/added/14`` is what was added to their projections.
        ``axiscap/probes/14`` is the mean projection of the probes, read uncapped by the model as it is now.

        Returns
        -------
        dict[str, float]
            By the name that a trainer logs.

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
        sums = _sum_over_processes(self.installation._sums(_CAP))
        figures: dict[str, float] = {}
        for index, stats in self.installation._stats_of(_CAP, sums).items():
            if stats.rows:
                figures[f"axiscap/fired/{index}"] = stats.fired / stats.rows
                if stats.fired:
                    figures[f"axiscap/shortfall/{index}"] = stats.mean_shortfall[0]
                    figures[f"axiscap/added/{index}"] = stats.mean_added[0]
        return figures | self._read_probes()

    def _read_probes(self) -> dict[str, float]:
        if not self._probes:
            return {}
        cap, model = self.installation, self._model
        was_training, sums = model.training, {layer: [0.0, 0.0] for layer in self.profile.layers}
        model.eval()
        cap.select(_MEASURE)
        try:
            for begin in range(0, len(self._probes), _PROBES_PER_BATCH):
                ids, mask = _pad(self._probes[begin : begin + _PROBES_PER_BATCH], self._device)
                with torch.no_grad():
                    model(input_ids=ids, attention_mask=mask)
                for layer, projections in cap.projections().items():
                    finite = projections[..., 0][projections[..., 0].isfinite()]
                    sums[layer][0] += finite.double().sum().item()
                    sums[layer][1] += finite.numel()
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
    """Caps the training steps of a trainer, which then logs the figures of :meth:`TrainingCap.figures` beside its own.

    The trainer's checkpoints contain no cap: attach it again to a run that is resumed.

    Parameters
    ----------
    trainer
        a transformers ``Trainer``, or one of TRL's.
    profile
        the profile.
    every, rise, in_evaluation, probes, allow_other_model
        See :class:`TrainingCap`.

    Returns
    -------
    CapCallback
        Its ``cap`` is the :class:`TrainingCap` while the trainer trains. It takes the capping out when training ends;
        after an error, call its ``remove()``.

    Examples
    --------
    >>> from axiscap import training
    >>> callback = training.attach(trainer, profile, probes=[])
    >>> trainer.remove_callback(callback)
    """
    options = {"every": every, "rise": rise, "in_evaluation": in_evaluation, "probes": probes}
    options["allow_other_model"] = allow_other_model
    callback = CapCallback(profile, trainer.processing_class, options)
    # In front of the callbacks that report, so that the log has the figures when they read it.
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback


class CapCallback(TrainerCallback):  # type: ignore[misc]
    """The callback that :func:`attach` adds to a trainer.

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
        """Takes the capping out, if a run is capped.

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
        self.remove()  # a run that ended in an error has left its installation
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


def _sum_over_processes(sums: dict[int, Tensor]) -> dict[int, Tensor]:
    """The sums (K, F) of all processes, by layer. The fields "min" and "max" are summed too, and mean nothing."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return sums
    stacked = torch.stack(list(sums.values()))
    torch.distributed.all_reduce(stacked)
    return dict(zip(sums, stacked, strict=True))


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    if not getattr(tokenizer, "chat_template", None):
        return [tokenizer(text)["input_ids"] for text in texts]
    chats = [[{"role": "user", "content": text}] for text in texts]
    return [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] for chat in chats
    ]


def _pad(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The ids and the mask, each (texts, longest), padded on the right, so that no position moves."""
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=device)
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts], device=device)
    return ids, mask
