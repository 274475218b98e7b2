"""Quantiles of projections, from mergeable sketches (KLL, by Apache DataSketches)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from axiscap.profile.floors import PERCENTILES

#: A sketch of up to about this many values is exact. Beyond, its ranks are off by at most ``error``.
SKETCH_SIZE = 2048


class Sketch:
    """The distribution of projections at each layer, in bounded memory."""

    def __init__(self, depth: int) -> None:
        try:
            import datasketches
        except ModuleNotFoundError:
            raise ModuleNotFoundError("floors need datasketches: pip install 'axiscap[calibrate]'") from None
        self.layers = [datasketches.kll_floats_sketch(SKETCH_SIZE) for _ in range(depth)]

    def add(self, projections: Tensor) -> Sketch:
        """Adds (n, n_layers) values; returns itself."""
        for layer in range(len(self.layers)):
            self.add_at(layer, projections[:, layer])
        return self

    def add_at(self, layer: int, projections: Tensor) -> None:
        """Adds (n,) values of one layer."""
        self.layers[layer].update(projections.float().contiguous().numpy())

    def merge(self, other: Sketch) -> Sketch:
        """Adds another sketch's values; returns itself."""
        for sketch, other_sketch in zip(self.layers, other.layers, strict=True):
            sketch.merge(other_sketch)
        return self

    def __getstate__(self) -> list[bytes]:
        return [sketch.serialize() for sketch in self.layers]

    def __setstate__(self, state: list[bytes]) -> None:
        import datasketches

        self.layers = [datasketches.kll_floats_sketch.deserialize(data) for data in state]

    @property
    def count(self) -> int:
        """The smallest number of values at any layer."""
        return min(int(sketch.n) for sketch in self.layers)

    @property
    def error(self) -> float:
        """The largest error of a quantile's rank, from 0 to 1, with 99 % confidence; 0 while the sketch is exact."""
        errors = [sketch.normalized_rank_error(False) for sketch in self.layers if sketch.is_estimation_mode()]
        return float(max(errors, default=0.0))

    def table(self) -> Tensor:
        """The quantiles at :data:`PERCENTILES`, (n_layers, len(PERCENTILES)) float32."""
        ranks = [p / 100 for p in PERCENTILES]
        return torch.tensor([sketch.get_quantiles(ranks) for sketch in self.layers], dtype=torch.float32)


def describe(sketches: Mapping[str, Sketch]) -> dict[str, Any]:
    """The entry for the tables in a profile's provenance."""
    populations = {name: {"count": s.count, "rank_error": round(s.error, 5)} for name, s in sketches.items()}
    return {"percentiles": list(PERCENTILES), "populations": populations}
