"""SGLang with its cap made ineffective: it does not start, or it stops. Needs SGLang: `make test-serving`."""

from __future__ import annotations

import contextlib
import json
import os
import textwrap
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

pytest.importorskip("sglang", reason="needs SGLang: make test-serving")

from serving import configuration, refusal, running, small_model, wait_for
from test_sglang_serving import CPU, SERVER

from axiscap.serving.request import SettingsError
from axiscap.serving.settings import Settings
from axiscap.serving.sglang import adapter

#: Each process of a server runs this when it starts: it changes SGLang behind what AxisCap puts in place.
CHANGE = """
import copy
import axiscap_plugin

def register():
    put()
    import torch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
    from sglang.srt.model_executor.runner.eager_runner import EagerRunner
    from sglang.srt.models.llama import LlamaDecoderLayer

    def after(owner, name, change):
        original = getattr(owner, name)
        def changed(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            change(self)
            return result
        setattr(owner, name, changed)

    def without_hooks(module):
        fresh = copy.copy(module)
        fresh._forward_hooks = type(module._forward_hooks)()
        return fresh

    def replace_layer(model):
        model.model.layers[1] = without_hooks(model.model.layers[1])

    def uncapped(runner, execute, args, kwargs):
        layers = runner.model_runner.model.model.layers
        kept = [dict(layer._forward_hooks) for layer in layers]
        for layer in layers:
            layer._forward_hooks.clear()
        try:
            return execute(runner, *args, **kwargs)
        finally:
            for layer, hooks in zip(layers, kept):
                layer._forward_hooks.update(hooks)

{fault}

put, axiscap_plugin.register_sglang = axiscap_plugin.register_sglang, register
"""

FAULTS = {
    "a layer is replaced after it is capped": (
        "after(EagerRunner, '__init__', lambda runner: replace_layer(runner.model_runner.model))",
        "layer 1 of the decoding model measures no row",
    ),
    "the hooks are dropped": (
        """
        def drop(runner):
            for layer in runner.model_runner.model.model.layers:
                layer._forward_hooks.clear()
        after(EagerRunner, '__init__', drop)
        """,
        "layer 0 of the decoding model measures no row",
    ),
    "layers run without their hooks": (
        "LlamaDecoderLayer.__call__ = lambda self, *args, **kwargs: self.forward(*args, **kwargs)",
        "layer 0, a LlamaDecoderLayer, runs 0 times in a pass",
    ),
    "the output is read before the hooks": (
        """
        call = torch.nn.Module.__call__
        def calling(self, *args, **kwargs):
            batch = kwargs.get("forward_batch", args[2] if len(args) > 2 else None)
            hidden = self.forward(*args, **kwargs)
            stream = batch.residual_stream
            if self._forward_hooks:
                kept = [tensor.clone() for tensor in (stream.complete(hidden), stream.residual)]
                (hook,) = self._forward_hooks.values()
                hidden = hook(self, args, kwargs, hidden)
                hidden.copy_(kept[0])
                stream.residual.copy_(kept[1])
            return hidden
        LlamaDecoderLayer.__call__ = calling
        """,
        "layer 0, a LlamaDecoderLayer: what it returns does not change the model's result",
    ),
    "the op writes elsewhere": (
        """
        op = torch.ops.axiscap.cap_residual_.buffers
        class Elsewhere:
            @staticmethod
            def buffers(hidden, residual, *more):
                op(hidden, residual.clone(), *more)
        torch.ops.axiscap.cap_residual_ = Elsewhere
        """,
        "the cap at layer 0 of the decoding model changes nothing",
    ),
    "another copy of the model decodes": (
        """
        execute = EagerRunner._execute_decode
        EagerRunner._execute_decode = lambda self, *args, **kwargs: uncapped(self, execute, args, kwargs)
        """,
        "layer 0 of the decoding model measures no row",
    ),
    "another copy of the model reads prompts": (
        """
        execute = EagerRunner._execute_extend
        EagerRunner._execute_extend = lambda self, *args, **kwargs: uncapped(self, execute, args, kwargs)
        """,
        "layer 0 of the model that reads prompts measures no row",
    ),
    "batches come about by something else": (
        "ForwardBatch.init_new = classmethod(axiscap_init_new)",
        "a batch ran without the slots of its rows",
    ),
    "no model runs before graphs are captured": (
        "EagerRunner.__init__ = EagerRunner.__init__.__wrapped__",
        "runs no model before it captures graphs",
    ),
    "nothing is tested before the first batch": (
        "ModelRunner.init_cuda_graphs = ModelRunner.init_cuda_graphs.__wrapped__",
        "the scheduler loaded no model that could be capped",
    ),
    "the model is loaded by something else": (
        "ModelRunner.load_model = ModelRunner.load_model.__wrapped__",
        "the scheduler loaded no model that could be capped",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small_model(folder)
    (folder / "config.json").write_text(json.dumps(configuration(folder)))
    return folder


def changed(folder: Path, place: Path, fault: str) -> tuple[list[str], dict[str, str]]:
    """The command of a server that a fault changes, and its environment."""
    text = CHANGE.replace("{fault}", textwrap.indent(textwrap.dedent(fault), "    "))
    before = "put()\n"
    text = text.replace(
        f"    {before}",
        "    from sglang.srt.model_executor.forward_batch_info import ForwardBatch\n"
        f"    axiscap_init_new = ForwardBatch.init_new.__func__\n    {before}",
        1,
    )
    (place / "sitecustomize.py").write_text(text)
    paths = f"{place}:{os.environ.get('PYTHONPATH', '')}"
    environment = {"AXISCAP_CONFIG": str(folder / "config.json"), "PYTHONPATH": paths, **CPU}
    return [*SERVER, "--model-path", str(folder / "model")], environment


@pytest.mark.parametrize("fault", FAULTS)
def test_an_ineffective_cap_is_not_served(fault, folder, tmp_path):
    change, says = FAULTS[fault]
    command, environment = changed(folder, tmp_path, change)
    assert says in refusal(command, **environment)


def test_weights_that_are_loaded_while_serving(folder, tmp_path):
    """The cap is still in force behind an ordinary reload; one that replaces a layer ends the server."""
    fault = """
    import os
    def replace(updater):
        if os.path.exists(os.environ["REPLACE"]):
            replace_layer(updater.get_model())
    after(WeightUpdater, "update_weights_from_disk", replace)
    """
    command, environment = changed(folder, tmp_path, fault)
    mark, body = tmp_path / "replace", {"model_path": str(folder / "model")}
    with running(command, tmp_path, "custom_params", REPLACE=str(mark), **environment) as server:
        before = server.text("Who are you?", "strict")
        assert server.client.post("/update_weights_from_disk", json=body).json()["success"]
        assert server.text("Who are you?", "strict") == before
        assert server.text("Who are you?", "off") != before
        mark.touch()
        with contextlib.suppress(httpx.TransportError):  # it may be gone before it answers
            server.client.post("/update_weights_from_disk", json=body)
        wait_for(lambda: server.process.poll() is not None, seconds=120)
        assert "layer 1 of the decoding model measures no row" in server.log.read_text()


def test_a_layer_that_is_replaced_while_serving_ends_the_server_soon(folder, tmp_path):
    fault = """
    import os
    def replace(eager):
        if os.path.exists(os.environ["REPLACE"]):
            replace_layer(eager.model_runner.model)
    after(EagerRunner, "execute", replace)
    """
    command, environment = changed(folder, tmp_path, fault)
    mark = tmp_path / "replace"
    with running(command, tmp_path, "custom_params", REPLACE=str(mark), **environment) as server:
        server.text("Who are you?", "strict")
        mark.touch()
        with contextlib.suppress(httpx.TransportError, AssertionError):
            server.text("Who are you now?", "strict", max_tokens=100, ignore_eos=True)
        wait_for(lambda: server.process.poll() is not None, seconds=120)
        assert "layer 1 no longer measures the rows of a step: its cap is gone" in server.log.read_text()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"enable_memory_saver": True}, r"takes the profiles with it \(--enable-memory-saver\)"),
        ({"elastic_ep_backend": "mooncake"}, r"load models of their own \(--elastic-ep-backend\)"),
    ],
)
def test_what_takes_the_cap_away_while_serving_is_refused(options, says, folder, monkeypatch):
    settings = Settings.parse(configuration(folder))
    adapter._refuse(SimpleNamespace(speculative_algorithm=None, pp_size=1), settings)
    with pytest.raises(SettingsError, match=says):
        adapter._refuse(SimpleNamespace(speculative_algorithm=None, pp_size=1, **options), settings)
