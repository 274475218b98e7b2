"""docs/design.md names every module, and imports go only down the order that it states."""

from __future__ import annotations

import ast
import re

from conftest import REPOSITORY

#: Packages whose `__init__` exports the public names of their modules. `axiscap` also has the version.
FACES = {"axiscap", "axiscap.calibrate", "axiscap.drift", "axiscap.evaluate", "axiscap.serving", "axiscap.view"}


def modules() -> dict[str, ast.Module]:
    """The syntax tree of every module of the package, and of the plug-in, by dotted name."""
    trees = {}
    for path in [*(REPOSITORY / "axiscap").rglob("*.py"), REPOSITORY / "axiscap_plugin.py"]:
        name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        trees[name] = ast.parse(path.read_text("utf-8"))
    del trees["axiscap.data"]  # has no code
    return trees


def imports(tree: ast.Module, module_names: set[str]) -> set[str]:
    """The modules of the package that a module imports, at its top or in a function."""
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                imported.add(name if name in module_names else node.module)
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    return imported & module_names


def read_documented_order() -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """The documented level of each room and module of the package, and of each module in its room."""
    text = (REPOSITORY / "docs" / "design.md").read_text("utf-8")
    (block,) = re.findall(r"(?<=\n\n)    axiscap: .*?(?=\n\n)", text, re.DOTALL)
    orders: dict[str, dict[str, int]] = {}
    for line in re.sub(r"\n\s{8,}", " ", block).splitlines():
        room, order = line.strip().split(": ")
        orders[room] = {
            name.strip(): -level for level, names in enumerate(order.split("->")) for name in names.split(",")
        }
    return orders.pop("axiscap"), orders


def split_name(module: str) -> tuple[str, str]:
    """The room of a module and its name there. A module outside rooms is its own room, with an empty name."""
    parts = module.split(".")
    return parts[1], parts[2] if len(parts) > 2 else ""


def test_every_module_is_named_once():
    rooms, orders = read_documented_order()
    names_in_docs = [*rooms, *(f"{room}.{name}" for room, order in orders.items() for name in order)]
    module_names = set(modules()) - FACES - {"axiscap_plugin"}
    names_in_code = {module.removeprefix("axiscap.") for module in module_names}
    assert sorted(set(names_in_docs) - set(orders) - {"_C"}) == sorted(names_in_code)
    assert set(orders) == {face.split(".")[1] for face in FACES if "." in face}


def test_imports_go_down():
    rooms, orders = read_documented_order()
    trees = modules()
    wrong = []
    for module, tree in trees.items():
        if module in FACES or module == "axiscap_plugin":
            continue
        room, name = split_name(module)
        for other in imports(tree, set(trees)) - {"axiscap", "axiscap_plugin"}:
            other_room, other_name = split_name(other)
            if room == other_room and other_name:
                goes_down = orders[room][other_name] < orders[room][name]
            else:
                goes_down = rooms[other_room] < rooms[room]
            if not goes_down:
                wrong.append(f"{module} -> {other}")
    assert not wrong, wrong


def test_faces_import_only_their_own_rooms():
    trees = modules()
    for face in FACES - {"axiscap"}:
        assert all(other.startswith(f"{face}.") for other in imports(trees[face], set(trees))), face


def test_only_the_plugin_is_in_a_circle():
    """The plug-in imports the engines' adapters. They and the modules below them import its helpers."""
    trees = modules()
    assert imports(trees["axiscap_plugin"], set(trees)) == {"axiscap.serving.vllm", "axiscap.serving.sglang"}
    users = {module for module, tree in trees.items() if "axiscap_plugin" in imports(tree, set(trees))}
    assert users == {f"axiscap.serving.{name}" for name in ("vllm", "sglang", "door", "kv", "settings")}
