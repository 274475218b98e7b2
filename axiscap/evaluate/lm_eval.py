"""A model for the lm-evaluation-harness (lm-eval), so that its tasks run under a cap::

    python -m axiscap.evaluate.lm_eval --model axiscap --tasks gsm8k \\
        --model_args pretrained=FOLDER,profile=PROFILE,positions=all

This is ``lm_eval`` itself, with one more model. ``pretrained`` is a local folder, a hub's name, or
``smollm2-135m-instruct``; without ``profile`` the model is uncapped. All other arguments are those of its ``hf`` model.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

from axiscap import CapProfile, install, models


@register_model("axiscap")
class CappedLM(HFLM):
    """lm-eval's ``hf`` model under a cap."""

    def __init__(
        self,
        pretrained: str,
        *,
        profile: str | None = None,
        positions: Literal["all", "generated"] = "all",
        **more: Any,
    ) -> None:
        #: The inputs of the requests that are being scored, as the harness cuts them.
        self._inputs: set[tuple[int, ...]] = set()
        super().__init__(pretrained=models.folder(pretrained), **more)
        self.cap = install(self.model, CapProfile.load(profile), positions=positions) if profile else None

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        requests = list(requests)
        longest = self.max_length + 1
        self._inputs = {tuple([*context, *answer][-longest:][:-1]) for _, context, answer in requests}
        try:
            return super()._loglikelihood_tokens(requests, *args, **kwargs)
        finally:
            self._inputs = set()

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Gives the model the mask of a batch, which the harness pads without one."""
        mask = padding_mask(inps, self._inputs)
        if bool(mask.all()):
            return super()._model_call(inps, *args, **kwargs)

        def add_mask(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return args, kwargs | {"attention_mask": mask}

        handle = self.model.register_forward_pre_hook(add_mask, with_kwargs=True, prepend=True)
        try:
            return super()._model_call(inps, *args, **kwargs)
        finally:
            handle.remove()


def padding_mask(ids: Tensor, inputs: set[tuple[int, ...]]) -> Tensor:
    """The mask (batch, tokens) of rows that are known inputs, padded with zeros on the right. Other rows have no
    padding.
    """
    mask = torch.ones_like(ids)
    for row, tokens in enumerate(ids.tolist()):
        length = len(tokens)
        while length and tuple(tokens[:length]) not in inputs and tokens[length - 1] == 0:
            length -= 1
        if tuple(tokens[:length]) in inputs:
            mask[row, length:] = 0
    return mask


if __name__ == "__main__":
    cli_evaluate()
