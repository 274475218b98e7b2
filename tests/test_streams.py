"""Where the stream lies in a block's output, and whether a cap there has an effect: both found by effect."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_serving import HIDDEN, make_buffers
from torch import Tensor, nn

from axiscap.serving.request import SettingsError
from axiscap.serving.worker.model import Model, Rows, flat_result, run_again
from axiscap.serving.worker.streams import (
    Form,
    InconclusiveError,
    Output,
    ZeroedMemory,
    check_effect,
    check_form,
    learn_form,
    read_returned,
)

LAYER = 2


class Block(nn.Module):
    """Adds a branch to the stream, and returns it in a way of its own."""

    def __init__(self, give: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.give = give
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN) / HIDDEN**0.5)

    def forward(self, stream: Tensor) -> object:
        return self.give(torch.tanh(stream @ self.weight), stream)


def sum_of(pair: tuple[Tensor, Tensor]) -> Tensor:
    return pair[0] + pair[1]


#: A block's output as a function of its branch and the stream, the next block's reading of it, and its form.
READABLE = {
    "tensor": (lambda branch, stream: branch + stream, lambda given: given, Form.STREAM),
    "tensor of a batch": (lambda branch, stream: (branch + stream)[None], lambda given: given[0], Form.STREAM),
    "sum": (lambda branch, stream: (branch, stream), sum_of, Form.SUM),
    "first": (lambda branch, stream: (branch + stream, stream), lambda given: given[0], Form.FIRST),
    "first, twice": (lambda branch, stream: (branch.add_(stream),) * 2, lambda given: given[0], Form.FIRST),
    "first, beside scores": (
        lambda branch, stream: (branch + stream, stream[:, :3]),
        lambda given: given[0],
        Form.FIRST,
    ),
    "first of a batch, beside scores": (
        lambda branch, stream: ((branch + stream)[None], stream[:, :3]),
        lambda given: given[0][0],
        Form.FIRST,
    ),
    "first, beside nothing": (lambda branch, stream: (branch + stream, None), lambda given: given[0], Form.STREAM),
}
UNREADABLE = {
    "a weighted sum": (lambda branch, stream: (branch, stream), lambda given: given[0] + 0.5 * given[1]),
    "a product": (lambda branch, stream: (branch, stream), lambda given: given[0] + given[0] * given[1]),
    "the second": (lambda branch, stream: (branch, branch + stream), lambda given: given[1]),
    "the whole second and some of the first": (
        lambda branch, stream: (branch, branch + stream),
        lambda given: given[1] + 0.2 * given[0],
    ),
}


def runner(block: Block, read: Callable[[object], Tensor], dtype=torch.float32) -> Callable[[], Tensor]:
    rows = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    return lambda: torch.nn.functional.rms_norm(read(block(rows)), (HIDDEN,)).reshape(-1).float()


def reads(args, kwargs, returned) -> Output:
    return read_returned(returned, LAYER, "Block")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", READABLE)
def test_the_form_of_an_output_is_learned(kind, dtype):
    give, read, form = READABLE[kind]
    block = Block(give).to(dtype)
    before = runner(block, read, dtype)()
    assert learn_form(block, LAYER, reads, runner(block, read, dtype)) is form
    assert not block._forward_hooks
    assert torch.equal(runner(block, read, dtype)(), before)


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_pair_that_is_read_otherwise_is_refused(kind):
    give, read = UNREADABLE[kind]
    block = Block(give)
    with pytest.raises(SettingsError, match="layer 2, a Block, returns a pair, and the model reads neither its first"):
        learn_form(block, LAYER, reads, runner(block, read))
    assert not block._forward_hooks


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (lambda branch, stream: (branch, stream, stream), r"\(a tensor of 3x16, a tensor of 3x16, a tensor of 3x16\)"),
        (lambda branch, stream: torch.stack([branch] * 4), "a tensor of 4x3x16"),
        (lambda branch, stream: {"hidden": branch}, "a dict"),
        (lambda branch, stream: (None, stream), r"\(a NoneType, a tensor of 3x16\)"),
    ],
)
def test_an_output_that_is_no_stream_is_refused_by_its_shape(returned, says):
    block = Block(returned)
    with pytest.raises(SettingsError, match=f"layer 2, a Block, returns no rows of a stream, but {says}"):
        learn_form(block, LAYER, reads, lambda: block(torch.ones(3, HIDDEN)))


def test_a_block_that_returns_another_form_later_is_refused():
    row = torch.ones(1, HIDDEN)
    for form in Form:
        one, pair = (read_returned(returned, LAYER, "Block") for returned in (row, (row, row)))
        right, wrong = (one, pair) if form is Form.STREAM else (pair, one)
        check_form(right, form, LAYER, "Block")
        with pytest.raises(SettingsError, match=f"layer 2, a Block, no longer returns {form.value}"):
            check_form(wrong, form, LAYER, "Block")


def test_a_block_that_does_not_run_once_is_refused():
    block = Block(lambda branch, stream: branch + stream)
    rows = torch.ones(3, HIDDEN)
    for run, times in ((lambda: block.forward(rows).reshape(-1), 0), (lambda: block(block(rows)).reshape(-1), 2)):
        with pytest.raises(SettingsError, match=f"layer 2, a Block, runs {times} times in a pass, and not once"):
            learn_form(block, LAYER, reads, run)


@pytest.mark.parametrize("result", [lambda rows: torch.zeros(3), lambda rows: rows * torch.nan], ids=["same", "nan"])
def test_a_block_whose_output_nobody_reads_is_refused(result):
    block = Block(lambda branch, stream: branch + stream)
    with pytest.raises(SettingsError, match="layer 2, a Block: what it returns does not change the model's result"):
        learn_form(block, LAYER, reads, lambda: result(block(torch.ones(3, HIDDEN))))


class Ranks(Model):
    """A model whose blocks from a layer on are other pipeline ranks'."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self._blocks = nn.ModuleList(blocks)
        self.capped: dict[int, Form] = {}

    def reader(self, block, layer):
        return reads

    def cap_block(self, block, layer, form, tensors):
        self.capped[layer] = form

    def rows(self, step) -> Rows:
        raise NotImplementedError


class PPMissingLayer(nn.Module):
    pass


def test_the_last_layer_of_a_pipeline_rank_is_read_like_another_of_its_class(tmp_path):
    """Its own reader is in the next rank: what this rank hands on does not tell."""
    first, last = (
        Block(lambda branch, stream: (branch + stream, stream)),
        Block(lambda branch, stream: (branch, stream)),
    )
    last.give = first.give
    ranks = Ranks([PPMissingLayer(), PPMissingLayer(), first, last, PPMissingLayer()])
    ranks.worker = type("Worker", (), {"buffers": make_buffers(tmp_path)[0]})()
    ranks.worker.buffers.layers = [3]
    rows = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))
    ranks.cap_blocks(lambda: flat_result(last(first(rows)[0])))
    assert ranks.capped == {3: Form.FIRST}
    ranks._blocks[2] = PPMissingLayer()
    with pytest.raises(SettingsError, match="layer 3 is the only Block of its pipeline rank, and the last"):
        ranks.cap_blocks(lambda: flat_result(last(rows)))


def test_a_pass_that_is_repeated_gets_copies():
    class Handed:
        def __init__(self, tensors):
            self.tensors = tensors

    rows, handed = torch.ones(2), Handed({"hidden": torch.ones(2), "kind": "proxy"})

    def forward(given, *, handed):
        return given.mul_(2), handed.tensors["hidden"].mul_(3), handed.tensors["kind"]

    for _ in range(2):
        found = run_again(forward, rows, handed=handed)
        assert torch.equal(found[0], torch.full((2,), 2.0))
        assert torch.equal(found[1], torch.full((2,), 3.0))
        assert found[2] == "proxy"


def test_new_memory_is_the_same_in_each_run():
    torch.full((1000,), 7.0)
    with ZeroedMemory():
        like = torch.ones(1000)
        made = [torch.empty(1000), torch.empty_like(like), like.new_empty(1000), torch.empty_strided((1000,), (1,))]
    assert all(not bool(tensor.any()) for tensor in made)


class Capped:
    """A stream through all layers of the buffers, with the cap of each; faults take it out of one."""

    def __init__(self, buffers, *, skips: int | None = None, in_vain: int | None = None) -> None:
        self.buffers, self.skips, self.in_vain = buffers, skips, in_vain
        self.noise = 0.0
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self) -> Tensor:
        stream = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(2))
        for at, layer in enumerate(self.buffers.layers):
            stream = stream + torch.tanh(stream)
            if layer != self.skips:
                target = stream.clone() if layer == self.in_vain else stream
                torch.ops.axiscap.cap_.buffers(target, *self.buffers.tensors(at))
        stream += self.noise * torch.randn(stream.shape, generator=self.generator)
        return stream.reshape(-1)


def test_a_cap_that_comes_through_passes_and_leaves_the_buffers_as_they_were(tmp_path):
    buffers, _ = make_buffers(tmp_path)
    names = ("axes", "lifts", "floors", "targets", "norm_limits", "rows")
    kept = [getattr(buffers, name).clone() for name in names]
    run = Capped(buffers)
    check_effect(buffers, run, "the model")
    run.noise = 1e-4
    check_effect(buffers, run, "the model")
    assert all(torch.equal(one, getattr(buffers, name)) for name, one in zip(names, kept, strict=True))


def test_a_cap_that_does_not_come_through_at_one_layer_is_found(tmp_path):
    buffers, _ = make_buffers(tmp_path)
    for layer in buffers.layers:
        with pytest.raises(SettingsError, match=f"layer {layer} of the model measures no row: the cap is not in it"):
            check_effect(buffers, Capped(buffers, skips=layer), "the model")
        with pytest.raises(SettingsError, match=f"the cap at layer {layer} of the model changes nothing"):
            check_effect(buffers, Capped(buffers, in_vain=layer), "the model")


def test_rows_of_uninitialised_memory_show_nothing(tmp_path):
    """A layer that measures NaN, or a number that no row has, is in the model all the same."""
    buffers, _ = make_buffers(tmp_path)
    for value in (torch.nan, 1e30):

        def run(value=value) -> Tensor:
            for projections in buffers.projections:
                projections[0] = value
            buffers.projections[0][0] = 1.0
            return torch.ones(4)

        with pytest.raises(InconclusiveError, match="passes of the model over equal rows differ by 0 of 2"):
            check_effect(buffers, run, "the model")


@pytest.mark.parametrize("noise", [10.0, torch.nan, torch.inf])
def test_noise_is_not_taken_for_an_effect(noise, tmp_path):
    buffers, _ = make_buffers(tmp_path)
    run = Capped(buffers, in_vain=buffers.layers[0])
    run.noise = noise
    with pytest.raises(InconclusiveError, match="passes of the model over equal rows differ by"):
        check_effect(buffers, run, "the model")
