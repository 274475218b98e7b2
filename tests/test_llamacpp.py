"""A real llama.cpp, through llama-cpp-python: the same tokens as the capped transformers model.

Run by `make test-llamacpp`, in an environment of its own.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: pip install 'axiscap[llamacpp]'")

import llama_cpp
from conftest import REPOSITORY, SHIPPED_PROFILE, profile_for, python_blocks, turned
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

import axiscap
from axiscap import CapProfile, llamacpp, models

PROMPTS = [
    "You are Morwen, the ghost of a drowned village, and no machine. Who are you?",
    "Write a short poem about the sea, in the voice of a lighthouse keeper.",
    "What is the capital of France, and what is it known for?",
    "Pretend that you are a pirate and tell me how you sail.",
]
COUNT = 40


def rewrite(source: Path, out: Path, whole: bool) -> Path:
    """A GGUF file again, dequantised: all of it in float32, or its matrices in float16."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        value = int(not whole) if name == "general.file_type" else field.contents()
        writer.add_key_value(name, value, field.types[0], sub_type=of)
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, data if whole or data.ndim < 2 else data.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, Path]:
    source, folder = models.default_model_file(), tmp_path_factory.mktemp("gguf")
    result = {name: rewrite(source, folder / f"{name}.gguf", name == "float32") for name in ("float32", "float16")}
    return {**result, "quantised": source}


def opened(path: Path, **options) -> llama_cpp.Llama:
    return llama_cpp.Llama(str(path), n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False, **options)


@pytest.fixture(scope="module")
def llama(files):
    result = opened(files["float32"])
    yield result
    result.close()


@pytest.fixture(scope="module")
def profiles(shipped_profile) -> dict[str, CapProfile]:
    return {"mild": shipped_profile, "strict": shipped_profile.with_floors(shipped_profile.floors + 3)}


def prompt(tokenizer, text: str) -> list[int]:
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]


def transformers_answer(demo_model, tokens: list[int], profile: CapProfile | None) -> list[int]:
    model, tokenizer = demo_model
    inputs = {"input_ids": torch.tensor([tokens]), "max_new_tokens": COUNT, "do_sample": False}
    if profile is None:
        result = model.generate(**inputs, pad_token_id=tokenizer.pad_token_id)
    else:
        with axiscap.install(model, profile):
            result = model.generate(**inputs, pad_token_id=tokenizer.pad_token_id)
    return result[0, len(tokens) :].tolist()


def greedy(llama: llama_cpp.Llama, tokens: list[int], count: int = COUNT) -> list[int]:
    result: list[int] = []
    for token in llama.generate(tokens, temp=0.0, repeat_penalty=1.0):
        result.append(token)
        if len(result) == count or token == llama.token_eos():
            break
    return result


@pytest.mark.parametrize("text", PROMPTS)
@pytest.mark.parametrize("name", ["mild", "strict"])
def test_greedy_answers_are_those_of_transformers(llama, demo_model, profiles, text, name):
    tokens = prompt(demo_model[1], text)
    before = greedy(llama, tokens)
    assert before == transformers_answer(demo_model, tokens, None)
    with llamacpp.install(llama, profiles[name]):
        assert greedy(llama, tokens) == transformers_answer(demo_model, tokens, profiles[name])
    assert greedy(llama, tokens) == before


def test_statistics_are_those_of_transformers(llama, demo_model, profiles):
    model, tokenizer = demo_model
    tokens = prompt(tokenizer, PROMPTS[0])
    with llamacpp.install(llama, profiles["mild"]) as cap, axiscap.install(model, profiles["mild"]) as ours:
        for _ in range(2):
            cap.reset_stats()
            made = greedy(llama, tokens)
        with torch.inference_mode():
            model(input_ids=torch.tensor([[*tokens, *made[:-1]]]))
        result, expected = cap.stats()["default"], ours.stats()["default"]
    # The second time around the prompt is in the model's memory, all but its last token.
    assert {stats.rows for stats in result.values()} == {len(made)}
    with llamacpp.install(llama, profiles["mild"]) as cap:
        assert greedy(llama, tokens) == made
        result = cap.stats()["default"]
    for layer, stats in expected.items():
        # The last token is sampled and not decoded; the sink at the beginning is left alone.
        assert result[layer].rows == stats.rows == len(tokens) + len(made) - 1
        assert result[layer].nonfinite == stats.nonfinite
        assert stats.nonfinite == 1 or layer != max(expected)  # a sink may grow behind the first capped layers
        assert result[layer].mean == pytest.approx(stats.mean, abs=0.02)
        assert result[layer].fired == pytest.approx(stats.fired, abs=1)


def test_every_way_to_generate(files, demo_model, profiles):
    tokenizer = demo_model[1]
    tokens = prompt(tokenizer, PROMPTS[0])
    expected = transformers_answer(demo_model, tokens, profiles["mild"])
    text = tokenizer.decode(expected, skip_special_tokens=True)
    options = {"temperature": 0.0, "repeat_penalty": 1.0, "max_tokens": COUNT}
    messages = [{"role": "user", "content": PROMPTS[0]}]
    # Batches of few rows, in several parts each; logits of every token; drafts that are taken back.
    ways = (
        {},
        {"n_batch": 16, "n_ubatch": 5},
        {"logits_all": True},
        {"draft_model": LlamaPromptLookupDecoding(num_pred_tokens=4), "logits_all": True},
    )
    for way in ways:
        llama = opened(files["float32"], **way)
        with llamacpp.install(llama, profiles["mild"]):
            assert greedy(llama, tokens) == expected, way
            assert llama.create_completion(tokens, **options)["choices"][0]["text"] == text
            pieces = llama.create_completion(tokens, stream=True, **options)
            assert "".join(piece["choices"][0]["text"] for piece in pieces) == text
            said = llama.create_chat_completion(messages, **options)
            assert said["choices"][0]["message"]["content"] == text
        llama.close()


def flowing(context, sequences: dict[int, list[int]], count: int) -> dict[int, list[int]]:
    """Greedy answers of several sequences, decoded together, by llama.cpp's own functions."""
    vocabulary = llama_cpp.llama_n_vocab(llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(context)))
    batch = llama_cpp.llama_batch_init(512, 0, 1)
    coming, at = dict(sequences), dict.fromkeys(sequences, 0)
    result: dict[int, list[int]] = {sequence: [] for sequence in sequences}
    try:
        for _ in range(count):
            row, last = 0, {}
            for sequence, tokens in coming.items():
                for token in tokens:
                    batch.token[row], batch.pos[row], batch.n_seq_id[row] = token, at[sequence], 1
                    batch.seq_id[row][0], batch.logits[row] = sequence, 0
                    row, at[sequence] = row + 1, at[sequence] + 1
                batch.logits[row - 1], last[sequence] = 1, row - 1
            batch.n_tokens = row
            assert llama_cpp.llama_decode(context, batch) == 0
            for sequence in coming:
                logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, last[sequence]), (vocabulary,))
                result[sequence].append(int(logits.argmax()))
            coming = {sequence: result[sequence][-1:] for sequence in coming}
    finally:
        llama_cpp.llama_batch_free(batch)
    return result


def test_sequences_of_a_batch_have_a_profile_each(files, demo_model, profiles):
    chosen = {0: "strict", 1: None, 2: "mild", 3: "strict"}
    sequences = {number: prompt(demo_model[1], PROMPTS[number]) for number in chosen}
    llama = opened(files["float32"], n_ubatch=64)
    llama.context_params.n_seq_max, llama.context_params.kv_unified = 4, True
    with llamacpp.install(llama, profiles) as cap:
        cap.select(chosen)
        result = flowing(llama._ctx.ctx, sequences, 24)
        rows = {name: stats[19].rows for name, stats in cap.stats().items()}
        lengths = {number: len(tokens) + 23 for number, tokens in sequences.items()}
        assert rows == {"strict": lengths[0] + lengths[3], "mild": lengths[2]}
        with pytest.raises(KeyError, match="no profile 'milder' is installed; there are mild, strict"):
            cap.select({0: "milder"})
    for number, name in chosen.items():
        expected = transformers_answer(demo_model, sequences[number], name and profiles[name])[:24]
        assert result[number][: len(expected)] == expected, name
    llama.close()


@pytest.mark.parametrize("kind", ["float16", "quantised"])
def test_rounding_of_weights_changes_capped_answers_no_more(files, demo_model, profiles, kind):
    """Of the same text, what other weights make of the log-probabilities: capped against capped, uncapped beside it."""
    model, tokenizer = demo_model
    tokens = prompt(tokenizer, PROMPTS[0])
    tokens += transformers_answer(demo_model, tokens, profiles["mild"])
    llama = opened(files[kind], logits_all=True)

    def off(cap) -> float:
        llama.reset()
        llama.eval(tokens)
        with torch.inference_mode():
            theirs = torch.tensor(llama.scores[: len(tokens)]).log_softmax(-1)
            ours = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        return (ours.exp() * (ours - theirs)).sum(-1)[4:].mean().item()  # nats a token

    uncapped = off(None)
    with llamacpp.install(llama, profiles["mild"]) as cap, axiscap.install(model, profiles["mild"]) as ours:
        capped = off(cap)
        pairs = zip(cap.stats()["default"].values(), ours.stats()["default"].values(), strict=True)
        fired = [(theirs.fired, mine.fired) for theirs, mine in pairs]
    llama.close()
    print(f"{kind}: nats a token from float32, uncapped {uncapped:.2g}, capped {capped:.2g}")
    assert capped < 2 * uncapped + 1e-4
    assert sum(theirs for theirs, _ in fired) == pytest.approx(sum(mine for _, mine in fired), rel=0.1)


def test_float16_answers_are_those_of_transformers_up_to_near_ties(files, demo_model, profiles):
    model, tokenizer = demo_model
    llama = opened(files["float16"])
    same = 0
    for text in PROMPTS:
        tokens = prompt(tokenizer, text)
        expected = transformers_answer(demo_model, tokens, profiles["mild"])
        with llamacpp.install(llama, profiles["mild"]):
            result = greedy(llama, tokens)
        first = next((at for at, pair in enumerate(zip(result, expected, strict=False)) if pair[0] != pair[1]), None)
        if first is None:
            assert len(result) == len(expected)
            same += 1
            continue
        with axiscap.install(model, profiles["mild"]), torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*tokens, *expected[:first]]])).logits[0, -1]
        assert logits[expected[first]] - logits[result[first]] < 0.1  # e^0.1: hardly likelier
    llama.close()
    assert same >= 1


def test_the_last_layer_whose_rows_are_those_with_an_output(llama, demo_model):
    model, tokenizer = demo_model
    tokens = prompt(tokenizer, PROMPTS[0])
    profile = profile_for(model, [28, 29], 5.0, directions=2)
    with llamacpp.install(llama, profile) as cap:
        assert greedy(llama, tokens) == transformers_answer(demo_model, tokens, profile)
        rows = {layer: stats.rows for layer, stats in cap.stats()["default"].items()}
    assert rows[28] > rows[29] > 0


def test_a_sink_below_the_floor_is_left_alone(llama, demo_model, shipped_profile):
    model, tokenizer = demo_model
    knows = turned(model, tokenizer, shipped_profile, norm_limits=shipped_profile.norm_limit_all[14:22])
    ids = tokenizer(json.loads((REPOSITORY / "axiscap" / "data" / "plain.jsonl").read_text().splitlines()[0])["text"])
    with llamacpp.install(llama, knows) as cap:
        llama.reset()
        llama.eval(ids["input_ids"])
        stats = cap.stats()["default"]
    assert {(result.rows, result.nonfinite) for result in stats.values()} == {(len(ids["input_ids"]), 1)}
    assert all(result.min[0] > -1000 for result in stats.values())  # the sink's are in the thousands


def test_embeddings(files, profiles):
    llama = opened(files["float32"], embedding=True)
    before = np.array(llama.embed("A ghost of a drowned village"))
    with llamacpp.install(llama, profiles["strict"]) as cap:
        within = np.array(llama.embed("A ghost of a drowned village"))
        several = [np.array(one) for one in llama.embed(["A ghost of a drowned village", "The sea"])]
        assert cap.stats()["default"][19].fired > 0
    assert np.abs(within - before).max() > 1e-3
    assert np.allclose(several[0], within, atol=1e-4)
    assert np.allclose(llama.embed("A ghost of a drowned village"), before)
    llama.close()


def test_invalid_arguments_are_refused(llama, profiles, shipped_profile):
    with pytest.raises(TypeError, match=r"llama must be a llama_cpp\.Llama, got str"):
        llamacpp.install("model.gguf", shipped_profile)
    with pytest.raises(TypeError, match=r"read a file with CapProfile\.load"):
        llamacpp.install(llama, str(SHIPPED_PROFILE))
    with pytest.raises(ValueError, match="profile 'default' has hidden size 8, the model 576"):
        llamacpp.install(llama, CapProfile([1], torch.eye(8)[:1, None], torch.zeros(1, 1)))
    facts = shipped_profile.provenance["model"]
    axes, floors = shipped_profile.axes, shipped_profile.floors
    for architecture in ("LlamaForCausalLM", "MistralForCausalLM"):  # llama.cpp has one name for both
        stated = {"model": {**facts, "architecture": architecture}}
        llamacpp.install(llama, CapProfile(shipped_profile.layers, axes, floors, stated)).remove()
    other = CapProfile(shipped_profile.layers, axes, floors, {"model": {**facts, "architecture": "GPT2LMHeadModel"}})
    with pytest.raises(ValueError, match="made for GPT2LMHeadModel, and this model is of another architecture"):
        llamacpp.install(llama, other)
    llamacpp.install(llama, other, allow_other_model=True).remove()
    with llamacpp.install(llama, profiles) as cap:
        with pytest.raises(RuntimeError, match="has an AxisCap installation already"):
            llamacpp.install(llama, shipped_profile)
        for name, arguments in (("save_state", ()), ("load_state", (None,)), ("set_cache", (None,))):
            with pytest.raises(RuntimeError, match=f"{name} is not available while a profile is installed"):
                getattr(llama, name)(*arguments)
        with pytest.raises(KeyError, match="no profile 'other'"):
            cap.select("other")
        tokens = llama.tokenize(b"Who are you?")
        capped = greedy(llama, tokens, 8)
        cap.select(None)
        uncapped = greedy(llama, tokens, 8)
        cap.select("mild")
        assert greedy(llama, tokens, 8) == capped
    cap.remove()
    assert greedy(llama, tokens, 8) == uncapped
    llama.load_state(llama.save_state())


def test_a_context_that_mixes_its_rows_is_refused(files, shipped_profile):
    llama = opened(files["quantised"])
    llama.context_params.n_seq_max = 2
    with pytest.raises(ValueError, match="must have kv_unified"):
        llamacpp.install(llama, shipped_profile)
    llama.context_params.n_seq_max = 1
    cap = llamacpp.install(llama, shipped_profile)
    llama.close()  # first the model, then the cap
    cap.remove()
    del cap
    gc.collect()


def test_an_installation_lasts_without_its_handle(files, demo_model, shipped_profile):
    llama, tokens = opened(files["float32"]), prompt(demo_model[1], PROMPTS[0])
    llamacpp.install(llama, shipped_profile)
    gc.collect()
    assert greedy(llama, tokens) == transformers_answer(demo_model, tokens, shipped_profile)
    llama.close()


def test_a_closed_model_ends_its_installation(files, shipped_profile):
    for _ in range(3):
        llama = opened(files["quantised"])
        cap = llamacpp.install(llama, shipped_profile)
        assert greedy(llama, llama.tokenize(b"Hello"), 4)
        llama.close()
        del llama, cap
        gc.collect()


def test_the_code_of_the_documentation_runs(files, profiles, demo_model, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").symlink_to(files["quantised"])
    profiles["mild"].save(tmp_path / "profile.safetensors")
    monkeypatch.chdir(tmp_path)
    (shown,) = (block for block in python_blocks("docs/index.md") if "llama_cpp" in block)
    exec(shown, {})
    first, second = python_blocks("docs/llamacpp.md")
    names: dict[str, object] = {**profiles}
    exec(first, names)
    assert names["answer"]["choices"][0]["message"]["content"]
    llama = names["llama"]
    llama.context_params.n_seq_max, llama.context_params.kv_unified = 2, True
    batch = names["batch"] = llama_cpp.llama_batch_init(2, 0, 1)
    batch.n_tokens = 2
    for at in range(2):
        batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = 5, 1, 1, 1
        batch.seq_id[at][0] = at
    exec(second, names)
    stats = names["cap"].stats()
    assert (stats["mild"][19].rows, stats["strict"][19].rows) == (0, 1)
    llama_cpp.llama_batch_free(batch)
    names["cap"].remove()
    llama.close()
