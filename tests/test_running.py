"""Other ways to run a model: compiled, exported, copied, sharded, quantised, trained."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import assert_same_bits, profile_for
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from tiny_models import FLOOR, GREEDY, LAYERS, build, check_caps_and_leaves_no_trace, plain_cap, rows, tokens
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

import axiscap


@pytest.fixture
def llama() -> nn.Module:
    return build("Llama")


@pytest.mark.slow
def test_compiled_models(llama):
    profile = profile_for(llama, LAYERS, FLOOR)
    ids, short = tokens(2, 9), tokens(3, 4)
    with torch.no_grad(), plain_cap(llama, profile):
        expected, wanted_short = llama(ids).logits, llama(short).logits
    with torch.no_grad():
        plain = llama(ids).logits
        compiled = torch.compile(llama)
        torch.testing.assert_close(compiled(ids).logits, plain, atol=2e-5, rtol=2e-5)
        with axiscap.install(compiled, profile) as cap:
            torch.testing.assert_close(compiled(ids).logits, expected, atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(compiled(short).logits, wanted_short, atol=2e-5, rtol=2e-5)
            assert cap.stats()["default"][1].rows == 18 + 12
        torch.testing.assert_close(compiled(ids).logits, plain, atol=2e-5, rtol=2e-5)
        # Compiled with the cap in place, and after it has gone.
        with axiscap.install(llama, profile) as cap:
            inner = torch.compile(llama)
            torch.testing.assert_close(inner(ids).logits, expected, atol=2e-5, rtol=2e-5)
            assert cap.stats()["default"][1].rows == 18
        torch.testing.assert_close(inner(ids).logits, plain, atol=2e-5, rtol=2e-5)


@pytest.mark.slow
def test_compiled_with_a_selection(llama):
    names = {"low": profile_for(llama, [1], 0.3), "high": profile_for(llama, [2], 1.5)}
    ids = tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    compiled = torch.compile(llama)
    with axiscap.install(llama, names) as cap, torch.no_grad():
        for choice in (["low", None], ["high", "low"], "high"):
            cap.select(choice)
            expected = llama(ids, attention_mask=mask).logits
            result = compiled(ids, attention_mask=mask).logits
            real = mask.bool()
            torch.testing.assert_close(result[real], expected[real], atol=2e-5, rtol=2e-5)
        assert cap.stats()["high"][2].rows == 2 * (5 + 12)


def test_offloaded_weights(llama, tmp_path):
    """accelerate's hooks replace the forwards of modules whose weights lie on disk."""
    from accelerate import cpu_offload, disk_offload

    profile = profile_for(llama, LAYERS, FLOOR)
    ids = tokens(2, 6)
    with torch.no_grad(), plain_cap(llama, profile):
        expected = llama(ids).logits
    for offload in (lambda m: cpu_offload(m), lambda m: disk_offload(m, tmp_path / "weights")):
        model = offload(copy.deepcopy(llama))
        with torch.no_grad(), axiscap.install(model, profile):
            torch.testing.assert_close(model(ids).logits, expected, atol=2e-5, rtol=2e-5)


def test_device_map(llama, tmp_path):
    """Loaded with a device_map, part of it on disk."""
    llama.save_pretrained(tmp_path / "model")
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = dict.fromkeys(names, "cpu") | {f"model.layers.{i}": "disk" if i > 1 else "cpu" for i in range(4)}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    profile = profile_for(llama, LAYERS, FLOOR)
    ids = tokens(2, 6)
    with torch.no_grad(), plain_cap(llama, profile):
        expected = llama(ids).logits
    with torch.no_grad(), axiscap.install(model, profile) as cap:
        torch.testing.assert_close(model(ids).logits, expected, atol=2e-5, rtol=2e-5)
        assert cap.stats()["default"][2].rows == 12


def test_quantised_weights(llama):
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(llama), {nn.Linear}, torch.qint8)
    check_caps_and_leaves_no_trace(quantised)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(llama, dtype):
    model = llama.to(dtype)
    profile = profile_for(model, LAYERS, FLOOR)
    outputs = []
    with axiscap.install(model, profile), torch.no_grad():
        model.model.layers[2].register_forward_hook(lambda m, a, output: outputs.append(output))
        model(tokens(2, 6))
    projections = outputs[0].float() @ profile.axes[1, 0]
    assert outputs[0].dtype == dtype
    assert bool((projections > FLOOR - 0.02).all())


def test_gradients_flow_through_the_cap(llama):
    """Training with the cap in force: the gradients are those of the plain hooks."""
    profile = profile_for(llama, LAYERS, FLOOR)
    ids = tokens(2, 6)

    def gradient():
        llama.zero_grad()
        llama(ids, labels=ids).loss.backward()
        return llama.model.embed_tokens.weight.grad.clone()

    with plain_cap(llama, profile):
        expected = gradient()
    with axiscap.install(llama, profile):
        result = gradient()
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-4)
    assert expected.abs().max() > 0


def assert_capped_as_before(model, cap, expected) -> None:
    before = rows(cap)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens(2, 5)).logits, expected, atol=2e-5, rtol=2e-5)
    assert rows(cap) == before + 10
    assert cap.projections()[LAYERS[0]].shape == (2, 5, 1)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_an_export_leaves_nothing_behind(strict, llama):
    profile = profile_for(llama, LAYERS, FLOOR)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids, use_cache=False).logits

    with plain_cap(llama, profile), torch.no_grad():
        expected = llama(tokens(2, 5)).logits
    with axiscap.install(llama, profile) as cap, torch.no_grad():
        assert_capped_as_before(llama, cap, expected)
        program = torch.export.export(Logits().eval(), (tokens(2, 5),), strict=strict)
        torch.testing.assert_close(program.module()(tokens(2, 5)), expected, atol=2e-5, rtol=2e-5)
        assert_capped_as_before(llama, cap, expected)


def test_fake_and_meta_passes_leave_nothing_behind(llama):
    profile = profile_for(llama, LAYERS, FLOOR)
    with plain_cap(llama, profile), torch.no_grad():
        expected = llama(tokens(2, 5)).logits
    with axiscap.install(llama, profile) as cap, torch.no_grad():
        assert_capped_as_before(llama, cap, expected)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            assert llama(mode.from_tensor(tokens(2, 7))).logits.shape == (2, 7, 97)
        assert_capped_as_before(llama, cap, expected)
    shell = build("Llama").to("meta")
    with axiscap.install(shell, profile) as cap, torch.no_grad():
        assert shell(tokens(2, 7).to("meta")).logits.shape == (2, 7, 97)
        shell.to_empty(device="cpu")
        shell.load_state_dict(llama.state_dict())
        shell.model.rotary_emb.load_state_dict(llama.model.rotary_emb.state_dict())
        shell.model.rotary_emb.inv_freq.copy_(llama.model.rotary_emb.inv_freq)
        assert_capped_as_before(shell, cap, expected)


def test_a_trace_by_jit_is_refused(llama):
    llama.requires_grad_(False)
    with axiscap.install(llama, profile_for(llama, LAYERS, FLOOR)), torch.no_grad():
        for _ in range(2):  # the first pass looks for sinks, the later ones take the layers' fast way
            with pytest.raises(RuntimeError, match=r"use torch\.compile or torch\.export"):
                torch.jit.trace(lambda ids: llama(ids, use_cache=False).logits, tokens(1, 4))
            llama(tokens(1, 4))


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_pickle_of_a_capped_model_does_not_need_axiscap(llama, tmp_path):
    plain = llama.generate(tokens(2, 6), **GREEDY)
    with axiscap.install(llama, profile_for(llama, LAYERS, FLOOR)) as cap:
        cap.watch(lambda projections: None)
        torch.save(llama, tmp_path / "model.pt")
    assert b"axiscap" not in pickle.dumps(llama)
    code = f"""
import sys, torch
sys.modules["axiscap"] = None
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
print(model.generate(torch.tensor({tokens(2, 6).tolist()}), **{GREEDY}).tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith(str(plain.tolist())), done.stderr


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch])
def test_a_copy_is_not_capped(copied, llama):
    profile, ids = profile_for(llama, LAYERS, FLOOR), tokens(2, 6)
    plain = llama.generate(ids, **GREEDY)
    with axiscap.install(llama, profile) as cap:
        capped = llama.generate(ids, **GREEDY)
        again = copied(llama)
        assert not torch.equal(capped, plain)
        seen = rows(cap)
        with torch.no_grad():
            again.model.embed_tokens.weight.mul_(1)  # its own
        assert torch.equal(again.generate(ids, **GREEDY), plain)
        assert rows(cap) == seen
        with axiscap.install(again, profile) as own:
            assert torch.equal(again.generate(ids, **GREEDY), capped)
            assert rows(own) == seen
        assert torch.equal(llama.generate(ids, **GREEDY), capped)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_output_hidden_states_are_capped(before, grad, llama):
    """Also where transformers' recorder was there first."""
    profile = profile_for(llama, LAYERS, 3.0)
    with torch.set_grad_enabled(grad):
        if before:
            llama(tokens(1, 4), output_hidden_states=True)
        with axiscap.install(llama, profile):
            states = llama(tokens(1, 4), output_hidden_states=True).hidden_states
    for at, layer in enumerate(LAYERS):
        assert (states[layer + 1] @ profile.axes[at, 0]).min() > 2.999


@pytest.mark.parametrize("way", ["with gradients", "no_grad", "inference mode"])
def test_hooks_that_were_there_first_see_the_layers_own_output(way, llama):
    """Later ones see the capped output; what the earlier ones kept is not changed."""
    mode = {"with gradients": torch.enable_grad, "no_grad": torch.no_grad, "inference mode": torch.inference_mode}[way]
    profile, layer = profile_for(llama, LAYERS[:1], 20.0), llama.model.layers[LAYERS[0]]
    kept = []
    layer.register_forward_hook(lambda module, args, output: kept.append(output))
    with mode():
        llama(tokens(1, 9))
        own = kept.pop().clone()
        with axiscap.install(llama, profile):
            for _ in range(2):  # the first pass looks for sinks, the second takes the layers' fast way
                layer.register_forward_hook(lambda module, args, output: kept.append(output))
                llama(tokens(1, 9))
                before, after = kept[:2]
                kept.clear()
                assert_same_bits(before.detach(), own.detach())
                projections = after.detach().double() @ profile.axes[0, 0].double()
                torch.testing.assert_close(projections, torch.full((1, 9), 20.0).double())


class Skip(nn.Module):
    """A pruned layer: its output is its input."""

    def forward(self, hidden_states, **kwargs):
        return hidden_states


@pytest.mark.parametrize("grad", [True, False])
def test_a_layer_that_returns_its_input_leaves_the_callers_tensor(grad, llama):
    llama.model.layers[0], llama.model.layers[1] = Skip(), Skip()
    embeds = llama.get_input_embeddings()(tokens(1, 9)).detach()
    before = embeds.clone()
    with axiscap.install(llama, profile_for(llama, [1], 20.0)) as cap, torch.set_grad_enabled(grad):
        for _ in range(2):  # the first pass looks for sinks, the second takes the layers' fast way
            llama(inputs_embeds=embeds)
        assert cap.stats()["default"][1].fired == 18
    assert_same_bits(embeds, before)


@pytest.mark.parametrize("grad", [True, False])
def test_what_a_submodule_or_a_global_hook_keeps_is_not_changed(grad, llama):
    inner = llama.model.layers[1]
    outer = llama.model.layers[1] = nn.Sequential(inner)
    outer.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    kept = []
    inner.register_forward_hook(lambda module, args, output: kept.append(output))
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: kept.append(output) if module is outer else None
    )
    with torch.set_grad_enabled(grad):
        llama(tokens(1, 9))
        own = kept[0].detach().clone()
        with axiscap.install(llama, profile_for(llama, [1], 20.0)):
            for _ in range(2):
                llama(tokens(1, 9))
    handle.remove()
    assert len(kept) == 6
    for tensor in kept:
        assert_same_bits(tensor.detach(), own)


def test_a_steering_hook_comes_before_the_cap(llama):
    """Whatever another hook did to a layer's output is lifted as well."""
    profile = profile_for(llama, LAYERS, 3.0)
    axis = profile.axes[0, 0]
    llama.model.layers[LAYERS[0]].register_forward_hook(lambda m, a, output: output - 50 * axis)
    with axiscap.install(llama, profile), torch.no_grad():
        states = llama(tokens(1, 4), output_hidden_states=True).hidden_states
    assert (states[LAYERS[0] + 1] @ axis).min() > 2.999


@pytest.fixture
def mesh():
    """Of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("grad", [False, True])
def test_streams_that_are_distributed_tensors(grad, mesh, llama):
    """As where a model is sharded, or runs by a tensor-parallel plan."""
    profile, ids = profile_for(llama, LAYERS, FLOOR), tokens(2, 5)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, :2] = 0
    with plain_cap(llama, profile, mask), torch.no_grad():
        expected = llama(ids, attention_mask=mask).logits
    placement = Replicate()
    for layer in LAYERS:
        block = llama.model.layers[layer]
        block.register_forward_hook(lambda m, a, output: DTensor.from_local(output, mesh, [placement]))
    with axiscap.install(llama, profile) as cap, torch.set_grad_enabled(grad):
        for layer in LAYERS:
            block = llama.model.layers[layer]
            block.register_forward_hook(lambda m, a, output: output.to_local())
        result = llama(ids, attention_mask=mask).logits
        assert rows(cap) == 8
        torch.testing.assert_close(result, expected, atol=2e-5, rtol=2e-5)
        if grad:
            result.sum().backward()
            assert llama.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
        placement = Shard(0)
        with pytest.raises(ValueError, match=r"a DTensor with placements \(Shard\(dim=0\),\); it can be capped where"):
            llama(ids)


def sharded(rank: int, folder: str) -> None:
    """One of two processes that share a model, by its parameters (FSDP) or by its matrices (a tensor-parallel plan)."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    whole, ids = build("Llama"), tokens(2, 9)
    profile = profile_for(whole, LAYERS, FLOOR)
    with plain_cap(whole, profile):
        expected = whole(ids).logits
        written = whole.generate(ids, **GREEDY)
        expected.sum().backward()
    gradient = whole.get_input_embeddings().weight.grad

    parameters = build("Llama")
    for layer in parameters.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(parameters, mesh=mesh)
    matrices = transformers.LlamaForCausalLM.from_pretrained(folder, tp_plan="auto", device_mesh=mesh).eval()
    for model in (parameters, matrices):
        local = model.model.layers[0].mlp.up_proj.weight
        assert (local.to_local() if isinstance(local, DTensor) else local).numel() == 48 * 32 / 2
        with axiscap.install(model, profile) as cap:
            result = model(ids).logits
            assert rows(cap) == 18
            torch.testing.assert_close(result, expected, atol=2e-5, rtol=2e-5)
            result.sum().backward()
            mine = model.get_input_embeddings().weight.grad
            mine = mine.full_tensor() if isinstance(mine, DTensor) else mine
            torch.testing.assert_close(mine, gradient, atol=1e-4, rtol=1e-4)
            assert torch.equal(model.generate(ids, **GREEDY), written)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_models_that_two_processes_share(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    torch.multiprocessing.spawn(sharded, (str(tmp_path),), 2)


NAMED = {"low": 0.4, "high": 3.0}


class Actions(RuleBasedStateMachine):
    """A model with installations that come and go, beside a twin that the simplest hooks cap."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.twin = build("Llama"), build("Llama")
        self.profiles = {name: profile_for(self.model, LAYERS, floor) for name, floor in NAMED.items()}
        self.cap: axiscap.Installation | None = None
        self.chosen: str | None = None

    def teardown(self) -> None:
        if self.cap:
            self.cap.remove()

    @contextlib.contextmanager
    def twin_capped(self, mask=None):
        if self.cap is None or self.chosen is None:
            yield
        else:
            with plain_cap(self.twin, self.profiles[self.chosen], mask):
                yield

    @precondition(lambda self: self.cap is None)
    @rule()
    def install(self) -> None:
        self.cap, self.chosen = axiscap.install(self.model, self.profiles), "low"

    @precondition(lambda self: self.cap is not None)
    @rule()
    def remove(self) -> None:
        self.cap.remove()
        self.cap = None

    @precondition(lambda self: self.cap is not None)
    @rule(name=st.sampled_from([*NAMED, None]))
    def select(self, name) -> None:
        self.cap.select(name)
        self.chosen = name

    @rule(batch=st.integers(1, 3), length=st.integers(2, 9), padding=st.integers(0, 3), grad=st.booleans())
    def forward(self, batch, length, padding, grad) -> None:
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, : min(padding, length - 1)] = 0
        with torch.set_grad_enabled(grad):
            result = self.model(tokens(batch, length), attention_mask=mask).logits
            with self.twin_capped(mask):
                expected = self.twin(tokens(batch, length), attention_mask=mask).logits
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
        if self.cap is not None:
            assert self.cap.projections()[LAYERS[0]].shape == (batch, length, 1)

    @rule(way=st.sampled_from(["greedy", "beams", "static", "no cache", "lookup", "embeddings"]))
    def generate(self, way) -> None:
        ids = tokens(1, 4).repeat(1, 2)
        options = {
            "greedy": {"input_ids": ids},
            "beams": {"input_ids": ids, "num_beams": 2},
            "static": {"input_ids": ids, "cache_implementation": "static", "disable_compile": True},
            "no cache": {"input_ids": ids, "use_cache": False},
            "lookup": {"input_ids": ids, "prompt_lookup_num_tokens": 2},
            "embeddings": {},
        }[way]
        result = []
        for model in (self.model, self.twin):
            given = options or {"inputs_embeds": model.get_input_embeddings()(ids).detach()}
            with self.twin_capped() if model is self.twin else contextlib.nullcontext():
                made = model.generate(
                    **given, do_sample=False, max_new_tokens=5, output_scores=True, return_dict_in_generate=True
                )
            result.append((made.sequences, made.scores[-1][..., 3:]))
        assert torch.equal(result[0][0], result[1][0])
        torch.testing.assert_close(result[0][1], result[1][1], atol=1e-4, rtol=1e-4)

    @rule()
    def train(self) -> None:
        for model in (self.model, self.twin):
            with self.twin_capped() if model is self.twin else contextlib.nullcontext():
                model(tokens(2, 6), labels=tokens(2, 6)).loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.1 * parameter.grad)
                    parameter.grad = None
        for mine, twins in zip(self.model.parameters(), self.twin.parameters(), strict=True):
            torch.testing.assert_close(mine, twins, atol=1e-4, rtol=1e-4)
            twins.data.copy_(mine.data)  # so that what is left does not add up

    @rule(dtype=st.sampled_from([torch.bfloat16, torch.float16]))
    def cast(self, dtype) -> None:
        """There, where it runs, and back, with the same rounding in both."""
        for model in (self.model, self.twin):
            model.to(dtype)
        with torch.no_grad():
            assert bool(self.model(tokens(1, 5)).logits.isfinite().all())
        for model in (self.model, self.twin):
            model.float()

    @rule(copied=st.sampled_from([copy.deepcopy, through_pickle]))
    def copies(self, copied) -> None:
        with torch.no_grad():
            torch.testing.assert_close(copied(self.model)(tokens(1, 5)).logits, self.twin(tokens(1, 5)).logits)

    @rule()
    def fake(self) -> None:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode, torch.no_grad():
            assert self.model(mode.from_tensor(tokens(2, 4))).logits.shape == (2, 4, 97)

    @rule()
    def somebody_elses_error(self) -> None:
        """A pass that ends in the middle leaves nothing for the next one."""
        handle = self.model.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[1, :4] = 0
        with pytest.raises(ZeroDivisionError):
            self.model.generate(tokens(2, 6), attention_mask=mask, max_new_tokens=3)
        handle.remove()


TestActions = Actions.TestCase


TestActions.settings = settings(max_examples=12, stateful_step_count=10, deadline=None, derandomize=True)
