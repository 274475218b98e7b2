"""The code is laid out as docs/design.md says: it names every module, and imports go down its order alone."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter

from conftest import REPOSITORY


def modules() -> dict[str, ast.Module]:
    """The modules of both packages by their dotted names. A folder's name stands for its ``__init__``."""
    trees = {}
    for package in ("axiscap", "axiscap_plugin"):
        for path in (REPOSITORY / package).rglob("*.py"):
            name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
            trees[name] = ast.parse(path.read_text("utf-8"))
    return trees


def imports(tree: ast.Module, names: set[str]) -> set[str]:
    """The modules among ``names`` that a module imports, at its head or in a function."""
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                imported.add(name if name in names else node.module)
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    return imported & names


def folders(names: set[str]) -> set[str]:
    return {name for name in names if any(other.startswith(f"{name}.") for other in names)}


def documented_levels() -> dict[str, dict[str, int]]:
    """By folder of the package, the level of each of its modules and folders in the documentation's order."""
    text = (REPOSITORY / "docs" / "design.md").read_text("utf-8")
    (block,) = re.findall(r"(?<=\n\n)    axiscap: .*?(?=\n\n)", text, re.DOTALL)
    levels = {}
    for line in re.sub(r"\n\s{8,}", " ", block).splitlines():
        folder, order = line.strip().split(": ")
        path = "axiscap" if folder == "axiscap" else f"axiscap.{folder}"
        levels[path] = {
            name.strip(): -level for level, members in enumerate(order.split("->")) for name in members.split(",")
        }
    return levels


def test_the_documentation_names_every_module_once():
    names = {name for name in modules() if name.startswith("axiscap.")}
    levels = documented_levels()
    documented = [f"{folder}.{member}" for folder, members in levels.items() for member in members]
    assert sorted(set(documented) - {"axiscap._C"}) == sorted(names)
    assert len(documented) == len(set(documented))
    assert set(levels) == folders(set(modules())) - {"axiscap_plugin"}


def test_imports_go_down_the_documented_order():
    trees, levels = modules(), documented_levels()
    upward = []
    for module, tree in trees.items():
        if not module.startswith("axiscap."):
            continue
        for imported in imports(tree, set(trees)):
            if not imported.startswith("axiscap."):
                continue
            ours, theirs = module.split("."), imported.split(".")
            depth = next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
            if depth is None and imported.startswith(f"{module}."):  # a folder's own modules
                continue
            if depth is None:
                upward.append(f"{module} -> {imported}")
                continue
            order = levels[".".join(ours[:depth])]
            if order[theirs[depth]] >= order[ours[depth]]:
                upward.append(f"{module} -> {imported}")
    assert not upward, upward


def test_the_plugin_imports_the_adapters_when_a_server_starts():
    """Only this goes up: the adapters import the plug-in's leaf ``wrapping``, which imports nothing of AxisCap."""
    trees = modules()
    names = set(trees)
    assert imports(trees["axiscap_plugin"], names) == {
        "axiscap_plugin.wrapping",
        "axiscap.serving.sglang.adapter",
        *(f"axiscap.serving.vllm.{part}" for part in ("front", "points", "scheduler", "worker")),
    }
    assert imports(trees["axiscap_plugin.wrapping"], names) == set()
    assert not [name for name, tree in trees.items() if "axiscap_plugin" in imports(tree, names)]


def test_no_files_import_each_other_in_a_circle():
    trees = modules()
    graph = {name: imports(tree, set(trees)) - {"axiscap"} for name, tree in trees.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(error.args[1]) from None
