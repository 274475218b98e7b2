"""Capping while a model learns: real trainers, on tiny models."""

from __future__ import annotations

import copy
import gc
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import profile_for
from tiny_models import LAYERS, build, plain_cap, tokens
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

import axiscap
from axiscap import CapProfile, models, training
from axiscap.profile.floors import PERCENTILES

FLOOR = 0.4


class Texts(torch.utils.data.Dataset):
    """Random texts of several lengths, padded on the right, with labels for what is no padding."""

    def __init__(self, count: int = 12) -> None:
        self.ids = tokens(count, 9)
        self.real = torch.arange(9) < torch.tensor([5 + at % 5 for at in range(count)])[:, None]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        real = self.real[at]
        return {
            "input_ids": self.ids[at] * real,
            "attention_mask": real.long(),
            "labels": torch.where(real, self.ids[at], -100),
        }


@pytest.fixture
def llama():
    return build("Llama").train()


@pytest.fixture
def profile(llama) -> CapProfile:
    return profile_for(llama, LAYERS, FLOOR)


def trainer(model, out: Path, **options) -> Trainer:
    given = {
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
    } | options
    arguments = TrainingArguments(
        str(out), per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True, seed=3, **given
    )
    return Trainer(model, arguments, train_dataset=Texts(), eval_dataset=Texts(4))


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def logged(of: Trainer) -> list[dict[str, float]]:
    """What each training step logged, without its clock."""
    return [
        {name: value for name, value in entry.items() if "runtime" not in name and "per_second" not in name}
        for entry in of.state.log_history
        if "loss" in entry
    ]


def assert_close(result: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 2e-5) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, atol=tolerance, rtol=tolerance)


def test_a_trainer_learns_what_it_learns_under_the_hand_written_hook(llama, profile, tmp_path):
    other, plain = copy.deepcopy(llama), copy.deepcopy(llama)
    training.attach(ours := trainer(llama, tmp_path / "ours"), profile)
    ours.train()
    theirs = trainer(other, tmp_path / "theirs")
    original = theirs.compute_loss

    def capped(model, inputs, **more):
        with plain_cap(model, profile, inputs["attention_mask"]):
            return original(model, inputs, **more)

    theirs.compute_loss = capped
    theirs.train()
    (uncapped := trainer(plain, tmp_path / "uncapped")).train()
    assert_close(weights(llama), weights(other))
    with pytest.raises(AssertionError):
        assert_close(weights(llama), weights(plain))
    for result, expected in zip(logged(ours), logged(theirs), strict=True):
        assert result["loss"] == pytest.approx(expected["loss"], abs=1e-4)
        for layer in LAYERS:
            assert 0 < result[f"axiscap/fired/{layer}"] <= 1
            assert result[f"axiscap/added/{layer}"] == result[f"axiscap/shortfall/{layer}"] > 0
    assert "axiscap/fired/1" not in logged(uncapped)[0]
    assert not llama.model.layers[LAYERS[0]]._forward_hooks  # it is out again


WAYS = {
    "accumulated": {"gradient_accumulation_steps": 2, "per_device": 1},
    "checkpoints": {"gradient_checkpointing": True},
    "reentrant checkpoints": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_train_learns_the_same_weights(way, llama, profile, tmp_path):
    other = copy.deepcopy(llama)
    training.attach(one := trainer(other, tmp_path / "one", max_steps=3), profile)
    one.train()
    options = dict(WAYS[way])
    each = options.pop("per_device", 2)
    two = trainer(llama, tmp_path / "two", max_steps=3, **options)
    two.args.per_device_train_batch_size = two._train_batch_size = each
    training.attach(two, profile)
    two.train()
    assert_close(weights(llama), weights(other), 1e-4)
    if way != "accumulated":  # of which the last part is counted with the first
        for result, expected in zip(logged(two), logged(one), strict=True):
            assert result["axiscap/fired/2"] == pytest.approx(expected["axiscap/fired/2"])


def test_bfloat16_and_adapters(profile, tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    for kind in ("bfloat16", "autocast", "adapter"):
        model = build("Llama").train()
        if kind == "bfloat16":
            model = model.bfloat16()
        elif kind == "adapter":
            model = peft.get_peft_model(model, config)
        before = weights(model)
        training.attach(run := trainer(model, tmp_path / kind, bf16=kind == "autocast"), profile)
        run.train()
        changed = [name for name, value in weights(model).items() if not torch.equal(value, before[name])]
        assert changed
        assert kind != "adapter" or all("lora" in name for name in changed)
        assert all(entry["axiscap/fired/2"] > 0 for entry in logged(run))
        assert all(math.isfinite(entry["loss"]) for entry in logged(run))


def test_a_resumed_run_goes_on_to_the_bit(profile, tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole, part = build("Llama").train(), build("Llama").train()
    rising = with_table(profile)
    training.attach(one := trainer(whole, tmp_path / "one", **options), rising, rise=0.8)
    one.train()
    # Without hooks: what was saved loads as any model, and computes what the trained one does.
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "checkpoint-6").eval()
    ids = tokens(2, 7)
    assert torch.equal(saved(ids).logits, whole.eval()(ids).logits)
    assert not any(module._forward_hooks for module in saved.modules())

    training.attach(two := trainer(part, tmp_path / "two", **options), rising, rise=0.8)
    two.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-3"))
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(part).items())
    assert logged(two) == logged(one)


def with_table(profile: CapProfile) -> CapProfile:
    """A profile that knows where its floors could be: the table's lowest percentile lies 1 below them."""
    depth = profile.provenance["model"]["num_layers"]
    table = torch.linspace(FLOOR - 1, FLOOR + 1, len(PERCENTILES)).repeat(depth, 1)
    facts = {
        **profile.provenance,
        "floors": {"population": "ordinary tokens", "percentile": 50.0},
        "quantiles": {"percentiles": list(PERCENTILES), "populations": ["ordinary tokens"]},
    }
    axes = profile.axes[:1, 0].expand(depth, -1).contiguous()
    return CapProfile(profile.layers, profile.axes, profile.floors, facts, axis_all=axes, populations=table[None])


def test_floors_rise_and_steps_are_left_out(llama, profile):
    cap = training.TrainingCap(llama, with_table(profile), rise=0.5, every=2, in_evaluation=True)
    layer, batch = cap.installation._layers[LAYERS[0]], {"input_ids": tokens(2, 9), "labels": tokens(2, 9)}
    seen, fired = [], []
    for step in range(8):
        with cap.step(step, 8):
            llama(**batch).loss.backward()
        seen.append(layer.floors[0, 0].item())
        fired.append(cap.figures().get("axiscap/fired/1"))
    assert [floor - FLOOR for floor in seen] == pytest.approx([-1, -0.75, -0.5, -0.25, 0, 0, 0, 0], abs=1e-6)
    assert [share is not None for share in fired] == [True, False] * 4
    shares = fired[::2]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]
    cap.remove()


def test_evaluation_is_capped_only_on_request(llama, profile, tmp_path):
    ids = tokens(2, 9)
    with torch.no_grad():
        uncapped = llama(ids).logits
        with plain_cap(llama, profile):
            capped = llama(ids).logits
    for asked, expected in ((False, uncapped), (True, capped)):
        cap = training.TrainingCap(llama, profile, in_evaluation=asked)
        with torch.no_grad():
            torch.testing.assert_close(llama(ids).logits, expected, atol=2e-5, rtol=2e-5)
            with cap.step(0, 1):
                torch.testing.assert_close(llama(ids).logits, capped, atol=2e-5, rtol=2e-5)
        cap.remove()
    run = trainer(llama, tmp_path, eval_strategy="steps", eval_steps=2)
    training.attach(run, profile)
    run.train()
    # What it evaluated uncapped at the end is what it evaluates without a cap.
    last = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry][-1]
    assert run.evaluate()["eval_loss"] == last


def test_callbacks_that_report_get_the_figures_and_probes_are_uncapped(profile, tmp_path, demo_model):
    tokenizer = demo_model[1]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=49152, **sizes))
    reported: list[dict[str, float]] = []

    class Reports(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append(dict(logs))

    run = trainer(model, tmp_path)
    run.add_callback(Reports())
    run.processing_class = tokenizer
    callback = training.attach(run, profile, probes=["Who are you?", "Are you a ghost, and do you remember me?"])
    seen = []

    class Reads(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, model=None, **kwargs):
            if "loss" in logs:
                seen.append(probes_by_hand(model.eval(), tokenizer, profile))
                model.train()

    run.add_callback(Reads())
    run.train()
    assert callback.cap is None
    steps = [entry for entry in reported if "loss" in entry]
    assert len(steps) == 4
    for entry, expected in zip(steps, seen, strict=True):
        assert entry["axiscap/fired/1"] > 0
        for at, layer in enumerate(LAYERS[:1]):  # behind the first cap rows differ; the probes are read uncapped
            assert entry[f"axiscap/probes/{layer}"] == pytest.approx(expected[at], abs=1e-4)


def probes_by_hand(model, tokenizer, profile: CapProfile) -> list[float]:
    result: list[list[torch.Tensor]] = [[] for _ in profile.layers]
    blocks = models.decoder_layers(model)
    for text in ("Who are you?", "Are you a ghost, and do you remember me?"):
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        handles = [
            blocks[layer].register_forward_hook(
                lambda m, a, out, at=at: result[at].append(
                    (out[0] if isinstance(out, tuple) else out)[0] @ profile.axes[at, 0]
                )
            )
            for at, layer in enumerate(profile.layers)
        ]
        with torch.no_grad():
            model(**ids)
        for handle in handles:
            handle.remove()
    return [torch.cat(rows).mean().item() for rows in result]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trainers_of_trl(kind, profile, tmp_path, demo_model):
    trl = pytest.importorskip("trl", reason="needs TRL: pip install trl")
    import datasets

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=49152, **sizes))
    messages = [{"role": "user", "content": f"What is {number}?"} for number in range(8)]
    good, bad = ([{"role": "assistant", "content": text}] for text in ("A number.", "Arr, I am a pirate."))
    rows = (
        [{"messages": [turn, *good]} for turn in messages]
        if kind == "SFT"
        else [{"prompt": [turn], "chosen": good, "rejected": bad} for turn in messages]
    )
    options = {
        "max_steps": 3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
    }
    arguments = getattr(trl, f"{kind}Config")(str(tmp_path), per_device_train_batch_size=2, max_length=64, **options)
    run = getattr(trl, f"{kind}Trainer")(
        model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=demo_model[1],
        **({} if kind == "SFT" else {"ref_model": copy.deepcopy(model)}),
    )
    training.attach(run, profile)
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(entries) == 3
    for entry in entries:
        assert 0 < entry["axiscap/fired/1"] <= 1
        assert math.isfinite(entry["axiscap/probes/2"])
    assert not model.model.layers[LAYERS[0]]._forward_hooks


@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_a_backward_pass_computes_again(thread, reentrant, llama, profile):
    """Also where the hooks run again, and autograd does it in a thread of its own, as it does on a GPU."""
    batch = Texts(4)
    ids, mask = torch.stack([entry["input_ids"] for entry in batch]), batch.real.long()
    with plain_cap(llama, profile, mask):
        llama(ids, attention_mask=mask).logits.square().mean().backward()
    expected = llama.get_input_embeddings().weight.grad.clone()
    llama.zero_grad()
    for layer in LAYERS:
        block = llama.model.layers[layer]
        called = type(block).__call__
        block.__class__ = type(type(block).__name__, (type(block),), {
            "__call__": lambda self, hidden, called=called, **kwargs: checkpoint(
                lambda hidden: called(self, hidden, **kwargs), hidden, use_reentrant=reentrant
            )
        })  # fmt: skip
    with axiscap.install(llama, profile) as cap:
        loss = llama(ids, attention_mask=mask, use_cache=False).logits.square().mean()
        if thread:
            errors: list[BaseException] = []
            worker = threading.Thread(target=lambda: _caught(loss.backward, errors))
            worker.start()
            worker.join()
            assert not errors
        else:
            loss.backward()
        assert {stats.rows for stats in cap.stats()["default"].values()} == {int(mask.sum())}
    torch.testing.assert_close(llama.get_input_embeddings().weight.grad, expected, atol=2e-5, rtol=2e-5)


def _caught(call, errors: list[BaseException]) -> None:
    try:
        call()
    except BaseException as error:
        errors.append(error)


def test_the_cap_keeps_no_copy_of_the_hidden_states(llama, profile):
    """What autograd saves for the backward pass: bytes of all tensors, each storage once."""

    def saved(capped: bool) -> int:
        sizes: dict[int, int] = {}
        kept = []

        def pack(tensor):
            kept.append(tensor)  # so that no address comes twice
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            if capped:
                cap = training.TrainingCap(llama, profile)
                with cap.step(0, 1):
                    llama(ids).logits.sum()
                cap.remove()
            else:
                llama(ids).logits.sum()
        return sum(sizes.values())

    ids = tokens(8, 64)
    assert saved(True) <= 1.02 * saved(False)


def shared(rank: int, folder: str) -> None:
    """One of two processes that train: by gradients that are averaged (DDP), by sharded parameters (FSDP2), or by
    sharded matrices (a tensor-parallel plan).
    """
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    batches = [tokens(4, 9, seed=step) for step in range(3)]

    def run(model, inner, mine) -> dict[str, float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        cap = training.TrainingCap(inner, profile)
        for step, batch in enumerate(batches):
            with cap.step(step, len(batches)):
                model(input_ids=mine(batch), labels=mine(batch)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        result = cap.figures()
        cap.remove()
        return result

    def half(batch):
        return batch[rank * 2 : rank * 2 + 2]

    whole = build("Llama").train()
    profile = profile_for(whole, LAYERS, FLOOR)
    everything = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda sums: None  # this one is of one process
    expected = run(whole, whole, lambda batch: batch)
    torch.distributed.all_reduce = everything
    inner = build("Llama").train()
    averaged = DistributedDataParallel(inner)
    result = run(averaged, inner, half)
    assert_close(weights(inner), weights(whole))
    assert result == pytest.approx(expected, abs=1e-4)

    parts = build("Llama").train()
    for layer in parts.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(parts, mesh=mesh)
    result = run(parts, parts, half)
    assert_close({name: value.full_tensor() for name, value in parts.named_parameters()}, weights(whole))
    assert result == pytest.approx(expected, abs=1e-4)

    # Each process has all rows, and a part of each matrix.
    matrices = transformers.LlamaForCausalLM.from_pretrained(folder, tp_plan="auto", device_mesh=mesh).train()
    result = run(matrices, matrices, lambda batch: batch)
    made = {name: value.full_tensor() for name, value in matrices.named_parameters() if isinstance(value, DTensor)}
    assert "model.layers.0.mlp.up_proj.weight" in made
    assert_close(made, {name: value for name, value in weights(whole).items() if name in made})
    assert result == pytest.approx(expected, abs=1e-4)
    torch.distributed.barrier()
    del averaged
    gc.collect()  # nothing holds on to the group any more
    torch.distributed.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)  # the interpreter's end may meet a thread of gloo's that still runs, and be aborted


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
    build("Llama").save_pretrained(tmp_path)
    torch.multiprocessing.spawn(shared, (str(tmp_path),), 2)


def test_invalid_arguments_are_refused(llama, profile):
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        training.TrainingCap(llama, profile, every=0)
    with pytest.raises(ValueError, match=r"rise must be from 0 to 1, got 1\.5"):
        training.TrainingCap(llama, profile, rise=1.5)
    with pytest.raises(ValueError, match="does not say whose projections its floors are of"):
        training.TrainingCap(llama, profile, rise=0.5)
    with axiscap.install(llama, profile) as cap:
        with pytest.raises(KeyError, match="no profile 'x' is installed"):
            cap.set_floors(profile.floors, "x")
        with pytest.raises(axiscap.ProfileError, match="floors must"):
            cap.set_floors(profile.floors[:1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "code", "message"),
    [
        (
            "transformers",
            "import axiscap.training",
            "capping in training needs transformers: pip install 'axiscap[train]'",
        ),
        (
            "llama_cpp",
            "from axiscap import llamacpp; llamacpp.install(None, None)",
            "capping in llama.cpp needs llama-cpp-python: pip install 'axiscap[llamacpp]'",
        ),
    ],
)
def test_a_missing_dependency_names_its_extra(missing, code, message):
    code = f"import sys; sys.modules[{missing!r}] = None; {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert message in done.stderr
