"""Recording of projections while a model generates."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor

from axiscap.transformers import Installation


class Recorder:
    """Records the projections of every token while a model with an installation generates::

        with axiscap.install(model, profile) as cap, Recorder(cap) as recorder:
            model.generate(**inputs)
        recorder.projections()[0]  # of the first sequence: (layers, tokens), of the prompt and of the answer

    The model does not read the last token that it samples, which has no projection. Beam search reorders sequences,
    so that their recorded rows are mixed.

    Parameters
    ----------
    installation
        of :func:`axiscap.install`.

    Examples
    --------
    >>> from axiscap.drift import Recorder
    >>> with axiscap.install(model, profile) as cap, Recorder(cap) as recorder:
    ...     _ = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    >>> len(recorder.projections())
    1
    """

    def __init__(self, installation: Installation) -> None:
        self._installation = installation
        self._projections: list[Tensor] = []
        self._masks: list[Tensor] = []

    def __enter__(self) -> Recorder:
        self._stop_watching = self._installation.watch(self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_watching()

    def _record(self, by_layer: dict[int, Tensor]) -> None:
        projections = torch.stack([by_layer[layer][..., 0].cpu() for layer in sorted(by_layer)])
        mask = self._installation.real()
        if mask is None:
            mask = torch.ones(projections.shape[1:], dtype=torch.bool)
        self._projections.append(projections)
        self._masks.append(mask[:, -projections.shape[2] :].cpu())

    def projections(self) -> list[Tensor]:
        """The projections of each sequence, without padding; NaN for sinks.

        Returns
        -------
        list[Tensor]
            (layers, tokens) float32 each, in the order of the batch.

        Examples
        --------
        >>> from axiscap.drift import Recorder
        >>> with axiscap.install(model, profile) as cap, Recorder(cap) as recorder:
        ...     _ = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        >>> recorder.projections()[0].shape[0] == len(profile.layers)
        True
        """
        if not self._projections:
            return []
        projections, masks = torch.cat(self._projections, 2), torch.cat(self._masks, 1)
        return [projections[:, row, masks[row]] for row in range(projections.shape[1])]
