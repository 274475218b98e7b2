"""The documentation: its Python runs, and every public name is in the reference and says what it is."""

from __future__ import annotations

import ast
import doctest
import inspect
import json
import pkgutil
import re
import shlex

import prometheus_client
import pytest
import torch
import transformers
import typer
from conftest import REPOSITORY, python_blocks
from numpydoc.validate import validate

import axiscap
from axiscap import CapProfile, cli, drift, interop, models, reference
from axiscap.calibrate.store import Shard
from axiscap.drift import chat
from axiscap.view import chat_page


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
    for module in (axiscap, axiscap.ops, reference, interop, models, drift, chat, chat_page):
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


def public_names() -> list[str]:
    """What the reference shows: functions, classes, and what these have of the package's own."""
    page = (REPOSITORY / "docs" / "reference.md").read_text()
    found = []
    for shown, members in re.findall(r"^::: (\S+)\n(?:    options:\n      members: \[(.*?)\])?", page, re.MULTILINE):
        value = pkgutil.resolve_name(shown)
        if not inspect.ismodule(value):
            found.append(shown)
        elif members:
            found += [f"{shown}.{name}" for name in members.split(", ")]
        else:
            found += [
                f"{shown}.{name}"
                for name, part in vars(value).items()
                if getattr(part, "__module__", "") == shown and not name.startswith("_")
                if inspect.isclass(part) or inspect.isfunction(part)
            ]
    for name in list(found):
        value = pkgutil.resolve_name(name)
        own = value.__mro__ if inspect.isclass(value) else ()
        parts = {key: part for kind in own if kind.__module__.startswith("axiscap") for key, part in vars(kind).items()}
        found += [
            f"{name}.{key}"
            for key, part in parts.items()
            if not key.startswith(("_", "on_"))  # transformers calls on_train_begin and the like
            if inspect.isfunction(getattr(part, "__func__", part)) or isinstance(part, property)
        ]
    return found


#: Whatever else numpydoc looks at is style.
REQUIRED = {
    "GL08": "no docstring", "PR01": "a parameter is not documented", "PR02": "a parameter that it has not",
    "PR07": "a parameter without description", "RT01": "no Returns", "YD01": "no Yields", "EX01": "no Examples",
}  # fmt: skip
#: Made by functions, which have the parameters.
MADE = {"axiscap.Installation", "axiscap.llamacpp.Installation", "axiscap.training.CapCallback"}


def test_every_public_name_is_documented():
    names = public_names()
    assert {f"axiscap.{name}" for name in axiscap.__all__} <= {*names, "axiscap.ops"}
    assert len(names) > 100
    for name in names:
        wrong = {code for code, _ in validate(name)["errors"]} & REQUIRED.keys()
        assert not wrong - ({"PR01"} if name in MADE else set()), (name, [REQUIRED[code] for code in wrong])


@pytest.mark.slow
def test_the_examples_of_docstrings_run(names, tmp_path, monkeypatch):
    """Those that need llama.cpp, a hub or long are marked to be left out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    model, tokenizer = names["model"], names["tokenizer"]
    given = {
        **names, "torch": torch, "inputs": tokenizer("Who are you?", return_tensors="pt"), "folder": tmp_path,
        "shard": Shard([], [], [], [], torch.zeros(0, 30, 576)),
    }  # fmt: skip
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    said: list[str] = []
    for name in public_names():
        value = pkgutil.resolve_name(name)
        text = inspect.getdoc(value) or ""
        test = doctest.DocTestParser().get_doctest(text, dict(given), name, None, 0)
        runner.run(test, out=said.append)
        model.eval()
    assert not runner.failures, "".join(said)
    assert runner.tries > 200


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


def shell_lines(page: str) -> list[str]:
    """The commands of a page's shell blocks, with their continued lines."""
    text = (REPOSITORY / page).read_text().replace("\\\n", " ")
    words = "axiscap|python|make|cmake|pip"
    return re.findall(rf"^(?:    |\t)\s*(?:\$ )?((?:[A-Z_]+=\S+ )*(?:{words}) .*)$", text, re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if shell_lines(page)])
def test_the_commands_of_a_page_are_there(page):
    """Each `axiscap` line parses, each `python` line runs a file of the repository, each `make` line has its target."""
    targets = set(re.findall(r"^([\w. /-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    targets = {target for line in targets for target in line.split()}
    for line in shell_lines(page):
        words = shlex.split(line, comments=True)
        while "=" in words[0]:
            words.pop(0)
        stop = next((at for at, word in enumerate(words) if word in ("&&", "|", ">", ";", "&")), len(words))
        tool, *arguments = words[:stop]
        if tool == "axiscap":
            typer.main.get_command(cli.app).commands[arguments[0]].make_context(arguments[0], arguments[1:])
        elif tool == "make":
            wanted = [word for word in arguments if "=" not in word and not word.startswith("-")]
            assert set(wanted) <= targets, line
        elif tool == "python" and arguments[0] != "-m":
            assert (REPOSITORY / arguments[0]).is_file(), line


def _literal(node: ast.AST) -> str:
    """A message as the source has it, with … for what it names."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _literal(left) + _literal(right)
        case ast.IfExp(body=one, orelse=other):
            return f"{_literal(one)}\n{_literal(other)}"
    return "…"


#: What makes an error of a message.
ERRORS = r"(Error|NotCapped|_Wrong|_to_client|require|line\.error)$"


def _messages() -> dict[str, str]:
    """The messages of errors that the package raises, and where."""
    found = {}
    for path in sorted(path for room in ("axiscap", "axiscap_plugin") for path in (REPOSITORY / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and re.search(ERRORS, ast.unparse(node.func)):
                for argument in node.args:
                    for text in _literal(argument).split("\n"):
                        if len(re.sub(r"\W|axiscap", "", text)) >= 6:
                            found[text] = f"{path.name}:{node.lineno}"
    return found


def test_every_error_has_a_cure():
    """Each message that the package raises is on the page of troubleshooting, and each on the page is raised."""
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
    patterns = {}
    for row in re.findall(r"^\| (.+?) \| .+ \|$", page, re.MULTILINE):
        for text in re.findall(r"`([^`]*[a-z] [^`]*)`", row):
            patterns[text] = re.compile(".*".join(map(re.escape, re.split("…", text.rstrip("…")))))
    messages = _messages()
    assert len(messages) > 200
    missing = [
        f"{where}: {text}" for text, where in messages.items() if not any(p.search(text) for p in patterns.values())
    ]
    assert not missing, "\n".join(missing)
    sources = [REPOSITORY / "CMakeLists.txt", *(REPOSITORY / "csrc" / "torch").iterdir()]
    native = "\n".join(path.read_text() for path in sources)
    native = re.sub(r'"\s*"', "", re.sub(r'", | << |, "', "…", native))
    said = [
        _literal(node)
        for path in (REPOSITORY / "axiscap").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp)
    ]
    stale = [
        text
        for text, pattern in patterns.items()
        if not pattern.search(native) and not any(pattern.search(string) for string in said)
    ]
    assert not stale, "\n".join(stale)
