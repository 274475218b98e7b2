"""The cases of `axiscap bench` under pytest-benchmark, for its statistics, comparisons and history:

pytest benchmarks --benchmark-group-by=param:hidden_size,param:rows,param:dtype,param:fire
"""

from __future__ import annotations

import pytest

from axiscap.bench import kernels


@pytest.mark.parametrize("fire", kernels.SHARES)
@pytest.mark.parametrize("rows", kernels.ROWS)
@pytest.mark.parametrize("hidden_size", kernels.HIDDEN_SIZES)
@pytest.mark.parametrize("dtype", list(kernels.DTYPES))
@pytest.mark.parametrize("contender", ["axiscap", "bound", "eager", "compile", "published"])
def test_cap(benchmark, contender, dtype, hidden_size, rows, fire):
    case = kernels.Case(hidden_size, rows, dtype, fire)
    one_round = case.over_all_copies({**case.contenders(), "bound": case.bound()[0]}[contender])
    benchmark.extra_info["calls_per_round"] = len(case.copies)
    benchmark.pedantic(one_round, setup=case.restore, rounds=7, warmup_rounds=1)
