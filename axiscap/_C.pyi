from typing import ClassVar

from torch import Tensor

STAT_FIELDS: tuple[str, ...]
MAX_DIRECTIONS: int

class Bank:
    def __init__(
        self, axes: Tensor, floors: Tensor, lifts: Tensor | None = None, limits: Tensor | None = None
    ) -> None: ...
    @property
    def axes(self) -> Tensor: ...
    @property
    def floors(self) -> Tensor: ...
    @property
    def lifts(self) -> Tensor | None: ...
    @property
    def limits(self) -> Tensor | None: ...
    def cap_(self, hidden: Tensor, slots: Tensor | None = None, projections: Tensor | None = None) -> None: ...

class GgmlCallback:
    function: ClassVar[int]
    def __init__(self, functions: list[int], layers: list[tuple[Bank, Tensor] | None]) -> None: ...
    @property
    def data(self) -> int: ...
    def announce(self, slots: list[int], outputs: list[int]) -> None: ...
    def end(self) -> str | None: ...
    def set_other(self, slot: int) -> None: ...

def cap_(
    hidden: Tensor,
    axes: Tensor,
    floors: Tensor,
    slots: Tensor | None = None,
    lifts: Tensor | None = None,
    limits: Tensor | None = None,
    projections: Tensor | None = None,
) -> None: ...
def cap_residual_(
    hidden: Tensor,
    residual: Tensor,
    axes: Tensor,
    floors: Tensor,
    slots: Tensor | None = None,
    lifts: Tensor | None = None,
    limits: Tensor | None = None,
    projections: Tensor | None = None,
) -> None: ...
def add_rms_norm_cap_(
    hidden: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    axes: Tensor,
    floors: Tensor,
    slots: Tensor | None = None,
    weight_bias: float = 0.0,
    lifts: Tensor | None = None,
    limits: Tensor | None = None,
    projections: Tensor | None = None,
) -> None: ...
def add_rms_norm_cap_fp8_(
    quantized: Tensor,
    hidden: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    axes: Tensor,
    floors: Tensor,
    slots: Tensor | None = None,
    weight_bias: float = 0.0,
    scale: Tensor | None = None,
    scales: Tensor | None = None,
    lifts: Tensor | None = None,
    limits: Tensor | None = None,
    projections: Tensor | None = None,
) -> None: ...
def cap_layers_(
    hiddens: list[Tensor],
    axes: Tensor,
    floors: Tensor,
    slots: Tensor | None = None,
    lifts: Tensor | None = None,
    limits: Tensor | None = None,
    projections: Tensor | None = None,
) -> None: ...
def accumulate_(stats: Tensor, projections: Tensor, floors: Tensor, slots: Tensor | None = None) -> None: ...
def read_pass(tensor: Tensor) -> None: ...
def read_modify_write_pass(tensor: Tensor) -> None: ...
def isa() -> str: ...
def plan(dtype: str, hidden_size: int, rows: int, resident: int) -> tuple[int, int, int, int]: ...
def stats_plan(rows: int, slots: int, layers: int) -> tuple[bool, int, int]: ...
def accelerator() -> str | None: ...
def accelerator_versions() -> tuple[int, int] | None: ...
