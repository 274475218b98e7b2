"""Wrappers around generate() and its helpers, which know the padding mask and the end of the prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

from torch import Tensor

from axiscap.transformers.batching import Batching, check_batching_config, default_batching_config
from axiscap.transformers.endings import Endings, option_of
from axiscap.transformers.hooks import ModelHooks
from axiscap.transformers.rows import Generation, mask_of
from axiscap.transformers.selection import Selection, slots_of_sequences
from axiscap.transformers.wrapping import MethodWrapper


class GenerateWrappers:
    """The wrapped methods of a model that generates.

    Parameters
    ----------
    hooks
        of the model's passes, to which the wrappers announce the rows.
    generated_only
        whether only rows of tokens that the model wrote are capped.
    """

    def __init__(self, hooks: ModelHooks, selection: Selection, generated_only: bool) -> None:
        self._hooks, self._selection, self._generated_only = hooks, selection, generated_only
        self._mask_name = "decoder_attention_mask" if hooks.is_encoder_decoder else "attention_mask"
        self._ids_name = "decoder_input_ids" if hooks.is_encoder_decoder else "input_ids"

    def wrap(self, model: Any, undo: list[Callable[[], None]]) -> None:
        """Wraps the methods that the model has; ``undo`` gets what restores them."""
        self._model = model
        if not hasattr(model, "prepare_inputs_for_generation"):
            return
        wrappers = {
            "prepare_inputs_for_generation": self._prepare_inputs,
            "generate": self._generate,
            "generate_batch": self._generate_batch,
            "init_continuous_batching": self._init_continuous_batching,
        }
        for name, call in wrappers.items():
            if hasattr(model, name):
                undo.append(MethodWrapper(model, name, call).undo)
        undo.append(self._leave_batchings)

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``generate``: notes the prompt and the end of each answer."""
        thread = self._hooks.threads.mine
        generation = thread.generation
        generation.depth += 1
        if generation.depth == 1:
            self._begin_generation(generation, args, kwargs)
        try:
            with self._selection.pinned(), self._preparation_is_wrapped():
                return original(*args, **kwargs)
        finally:
            generation.depth -= 1
            thread.announced = None
            if not generation.depth:
                thread.generation, thread.endings = Generation(), None

    def _begin_generation(self, generation: Generation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs.get("inputs")
        ids = kwargs.get(self._ids_name)
        if ids is None and not self._hooks.is_encoder_decoder:
            ids = inputs
        embeds = kwargs.get("inputs_embeds")
        batched = next((value for value in (ids, embeds, inputs, kwargs.get("input_ids")) if is_batched(value)), None)
        generation.sequences = None if batched is None else len(batched)
        self._hooks.threads.mine.endings = Endings(self._model, kwargs)
        if is_batched(ids):
            generation.prompt_length, generation.has_given_prompt = ids.shape[1], True
            return
        # A sequence begins with the embeddings, or with the tokens that generate() puts there, of which at least one.
        generation.prompt_length = int(embeds is None)
        generation.has_given_prompt = self._drafts(kwargs)

    def _drafts(self, kwargs: dict[str, Any]) -> bool:
        """Whether the tokens of the first pass end with drafted ones."""
        names = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
        return any(option_of(self._model, kwargs, name) for name in names)

    @contextlib.contextmanager
    def _preparation_is_wrapped(self) -> Iterator[None]:
        """Wraps the method that PEFT puts in place of the wrapped one, as long as its generate() runs."""
        if isinstance(self._model.prepare_inputs_for_generation, MethodWrapper):
            yield
            return
        wrapper = MethodWrapper(self._model, "prepare_inputs_for_generation", self._prepare_inputs)
        try:
            yield
        finally:
            wrapper.undo()

    def _prepare_inputs(self, original: Callable[..., Any], input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``prepare_inputs_for_generation``: announces the rows of the next pass."""
        thread = self._hooks.threads.mine
        generation = thread.generation
        inputs = original(input_ids, *args, **kwargs)
        ids, mask = inputs.get(self._ids_name), mask_of(inputs.get(self._mask_name))
        tokens = (inputs["inputs_embeds"] if ids is None else ids).shape[1]
        mask_before = mask_of(kwargs.get(self._mask_name))
        mask = mask_before if mask is None else mask
        if kwargs.get("is_first_iteration"):
            generation.begin(input_ids)
        elif generation.depth == 0 and generation.prompt_length == 0:
            return inputs  # a loop of the caller's, which does not tell where its prompt ends
        generation.advance(input_ids, thread.endings)
        rows = generation.rows(mask, tokens, self._generated_only)
        if rows.written and ids is None and mask is not None and mask_before is not None:
            # In each step, PEFT adds the virtual tokens of prompt tuning in front of the embeddings and the mask.
            virtual = mask.shape[1] - mask_before.shape[1]
            rows = rows._replace(written=min(rows.written, tokens - virtual))
        thread.announced = rows
        return inputs

    def _generate_batch(self, original: Callable[..., Any], inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """``generate_batch``: checks the selection and the settings in the caller's thread.

        An error in the manager's thread would end in empty answers.
        """
        slots_of_sequences(self._selection.current(), len(inputs))
        config = kwargs.get("continuous_batching_config", args[1] if len(args) > 1 else None)
        if config is not None:
            check_batching_config(config)
        return original(inputs, *args, **kwargs)

    def _init_continuous_batching(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``init_continuous_batching``: follows the requests of the new manager."""
        if len(args) < 2 and kwargs.get("continuous_batching_config") is None:
            kwargs["continuous_batching_config"] = default_batching_config()
        manager = original(*args, **kwargs)
        check_batching_config(manager.continuous_batching_config)
        if not any(batching.manager is manager for batching in self._hooks.batchings):
            self._hooks.batchings.add(Batching(manager, self._selection))
        return manager

    def _leave_batchings(self) -> None:
        for batching in list(self._hooks.batchings):
            batching.undo()


def is_batched(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a tensor with one entry for each sequence."""
    return isinstance(value, Tensor) and value.dim() > 1
