"""The documentation: its Python runs, and every public name is in the reference and says what it is."""

from __future__ import annotations

import inspect
import json
import re

import prometheus_client
import pytest
import torch
import transformers
from conftest import REPOSITORY, python_blocks

import axiscap
from axiscap import CapProfile, drift, interop, models, reference
from axiscap.view import chat


@pytest.fixture(scope="module")
def names(demo_model, shipped_profile, tmp_path_factory):
    """What the blocks take for granted."""
    model, tokenizer = demo_model
    ids = tokenizer(["Who are you?"] * 3, return_tensors="pt")
    batch = {"input_ids": torch.arange(3, 12)[None], "labels": torch.arange(3, 12)[None]}
    text = {name: value[0] for name, value in batch.items()}
    arguments = transformers.TrainingArguments(
        str(tmp_path_factory.mktemp("trainer")), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True,
        per_device_train_batch_size=1, save_strategy="no", learning_rate=0.0,
    )  # fmt: skip
    return {
        "axiscap": axiscap, "json": json, "model": model, "tokenizer": tokenizer, "profile": shipped_profile,
        "strict": shipped_profile.with_floors(shipped_profile.floors + 3), "mild": shipped_profile,
        "batch": {**ids, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0},
        "projections": torch.zeros(5), "batches": [batch],
        "line": json.dumps({"answer": {"19": {"rows": 3, "fired": 1, "mean_projection": [-9.0]}}}),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.0),
        "trainer": transformers.Trainer(model, arguments, train_dataset=[text], processing_class=tokenizer),
    }  # fmt: skip


PAGES = ("README.md", *(str(path.relative_to(REPOSITORY)) for path in sorted((REPOSITORY / "docs").glob("*.md"))))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page) and page != "docs/llamacpp.md"])
def test_the_python_of_a_page_runs(page, names, shipped_profile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    shipped_profile.save(tmp_path / "profile.safetensors")
    published = CapProfile(shipped_profile.layers, shipped_profile.axes, shipped_profile.floors)
    interop.write_capping_config(published, tmp_path / "capping_config.pt", "layers_46:54-p0.25")
    said = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am an assistant."}]
    (tmp_path / "conversations.jsonl").write_text(json.dumps(said))
    here = dict(names)
    try:
        for block in python_blocks(page):
            if "llama_cpp" not in block:  # test_llamacpp.py runs those
                exec(compile(block, page, "exec"), here)
    finally:
        if "watch" in here:
            prometheus_client.REGISTRY.unregister(here["watch"])
        here["model"].eval()


def test_every_public_name_says_what_it_is():
    shown = re.findall(r"^::: (\S+)$", (REPOSITORY / "docs" / "reference.md").read_text(), re.MULTILINE)
    assert {f"axiscap.{name}" for name in axiscap.__all__} <= set(shown)
    missing = []
    for module in (axiscap, axiscap.ops, reference, interop, models, drift, chat):
        for name, value in vars(module).items():
            own = getattr(value, "__module__", "").startswith("axiscap")
            if name.startswith("_") or not own or not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            if not inspect.getdoc(value):
                missing.append(f"{module.__name__}.{name}")
            if inspect.isclass(value):
                missing += [
                    f"{module.__name__}.{name}.{key}"
                    for key, part in vars(value).items()
                    if inspect.isfunction(part) and not key.startswith("_") and not inspect.getdoc(part)
                ]
    assert not missing


#: What was said otherwise before, by what is to be said.
WORDS = {
    r"\b[Tt]alks?\b(?! (?:to|about|with)\b)|\btalker\b": "conversation",
    r"\bheld twice\b": "uncapped and capped",
    r"\basks? (?:nobody|no other host) for anything\b": "self-contained",
    r"\bwhat is deep\b": "details",
}


def test_the_words_are_those_of_the_field():
    pages = [path for path in (*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")) if path.stem != "demo"]
    sources = [*(REPOSITORY / "axiscap").rglob("*.py"), *(REPOSITORY / "axiscap").rglob("*.html")]
    for path in (*pages, *sources):
        for pattern, better in WORDS.items():
            found = re.search(pattern, path.read_text("utf-8"))
            if path.name != "CHANGELOG.md":  # which says what things were called
                assert found is None, f"{path}: {found and found[0]!r}; say {better!r}"
