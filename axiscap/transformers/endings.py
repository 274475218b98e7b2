"""Where the answers of a batch end: generate() goes on with padding behind the answer that ended first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def option_of(model: Any, kwargs: dict[str, Any], name: str) -> Any:
    """An option of a generate() call: its argument, else that of its configuration, else that of the model's."""
    if name in kwargs:
        return kwargs[name]
    for config in (kwargs.get("generation_config"), getattr(model, "generation_config", None)):
        if (value := getattr(config, name, None)) is not None:
            return value
    return None


class Endings:
    """The ends of the answers of one generate() call.

    An answer ends with an end-of-sequence token behind which all is padding, or where a stopping criterion holds.

    Parameters
    ----------
    kwargs
        the arguments of the call; its stopping criteria are replaced by observed ones.
    """

    def __init__(self, model: Any, kwargs: dict[str, Any]) -> None:
        stops, padding = option_of(model, kwargs, "eos_token_id"), option_of(model, kwargs, "pad_token_id")
        self._stops = torch.as_tensor([] if stops is None else stops).reshape(-1)
        first_stop = self._stops[0].item() if len(self._stops) else -1
        self._padding = int(first_stop if padding is None else padding)
        #: (batch,): the length of each sequence when a criterion held first.
        self._lengths: Tensor | None = None
        if (option_of(model, kwargs, "num_beams") or 1) > 1:
            return  # criteria see candidates, which are no rows
        criteria = [self._observed(criterion) for criterion in kwargs.get("stopping_criteria") or ()]
        strings, tokenizer = option_of(model, kwargs, "stop_strings"), kwargs.get("tokenizer")
        if strings is not None and tokenizer is not None:
            from transformers import StopStringCriteria

            criterion = self._observed(StopStringCriteria(tokenizer, strings))
            criteria.append(lambda input_ids, *args, **kwargs: torch.zeros_like(criterion(input_ids, *args, **kwargs)))
        if criteria:
            kwargs["stopping_criteria"] = criteria

    def _observed(self, criterion: Callable[..., Any]) -> Callable[..., Any]:
        if hasattr(criterion, "eos_token_id") or hasattr(criterion, "max_length"):
            return criterion  # generate() looks for these attributes

        def observed(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            holds = criterion(input_ids, *args, **kwargs)
            batch, length = input_ids.shape
            flags = torch.as_tensor(holds, device=input_ids.device).expand(batch)
            endless = torch.full((batch,), torch.iinfo(torch.long).max, device=input_ids.device)
            lengths = torch.where(flags, length, endless)
            self._lengths = lengths if self._lengths is None else torch.minimum(self._lengths, lengths)
            return holds

        return observed

    def behind(self, input_ids: Tensor, prompt_length: int) -> Tensor | None:
        """(batch, written): which written tokens lie behind the end of their answer; None if none does."""
        written = input_ids[:, prompt_length:]
        behind = torch.zeros_like(written, dtype=torch.bool)
        if len(self._stops):
            is_stop = torch.isin(written, self._stops.to(written.device)).long()
            behind_stop = is_stop.cumsum(1) > is_stop
            has_gone_on = (behind_stop & (written != self._padding)).any(1, keepdim=True)
            behind = behind_stop & ~has_gone_on
        if self._lengths is not None and len(self._lengths) == len(written):
            columns = torch.arange(prompt_length, input_ids.shape[1], device=written.device)
            behind = behind | (columns >= self._lengths[:, None])
        # On an accelerator, to look would need a synchronisation.
        return behind if behind.device.type != "cpu" or bool(behind.any()) else None
