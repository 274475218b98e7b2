"""The code is laid out as docs/design.md says: every module is named there, and imports go down its order alone."""

from __future__ import annotations

import ast
import re

from conftest import REPOSITORY

#: The face of a package stands for all of its modules; `axiscap` itself for its version and its public names.
FACES = {"axiscap"} | {
    f"axiscap.{room}" for room in ("calibrate", "drift", "evaluate", "serving", "transformers", "view")
}


def modules() -> dict[str, ast.Module]:
    """All of the package's, by their dotted names, lazily imported ones and the plug-in among them."""
    found = {}
    for path in [*(REPOSITORY / "axiscap").rglob("*.py"), REPOSITORY / "axiscap_plugin.py"]:
        name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text("utf-8"))
    del found["axiscap.data"]  # no code in it
    return found


def imports(tree: ast.Module, known: set[str]) -> set[str]:
    """The package's modules that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in known else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known


def stated() -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """From the documentation: the level of each room and module of the package, and of each module in its room."""
    text = (REPOSITORY / "docs" / "design.md").read_text("utf-8")
    (block,) = re.findall(r"(?<=\n\n)    axiscap: .*?(?=\n\n)", text, re.DOTALL)
    orders: dict[str, dict[str, int]] = {}
    for line in re.sub(r"\n\s{8,}", " ", block).splitlines():
        room, order = line.strip().split(": ")
        orders[room] = {
            name.strip(): -level for level, names in enumerate(order.split("->")) for name in names.split(",")
        }
    return orders.pop("axiscap"), orders


def place(module: str) -> tuple[str, str]:
    """Its room, or itself where it stands alone; and its name in there."""
    parts = module.split(".")
    return parts[1], parts[2] if len(parts) > 2 else ""


def test_every_module_is_named_once():
    rooms, orders = stated()
    named = [*rooms, *(f"{room}.{name}" for room, order in orders.items() for name in order)]
    known = set(modules()) - FACES - {"axiscap_plugin"}
    alone = {module.removeprefix("axiscap.") for module in known}
    assert sorted(set(named) - set(orders) - {"_C"}) == sorted(alone)
    assert set(orders) == {face.split(".")[1] for face in FACES if "." in face}


def test_imports_go_down():
    rooms, orders = stated()
    known = modules()
    wrong = []
    for module, tree in known.items():
        if module in FACES or module == "axiscap_plugin":
            continue
        room, name = place(module)
        for other in imports(tree, set(known)) - {"axiscap", "axiscap_plugin"}:
            there, what = place(other)
            down = orders[room][what] < orders[room][name] if room == there and what else rooms[there] < rooms[room]
            if not down:
                wrong.append(f"{module} -> {other}")
    assert not wrong, wrong


def test_faces_import_their_own_rooms_alone():
    known = modules()
    for face in FACES - {"axiscap"}:
        assert all(other.startswith(f"{face}.") for other in imports(known[face], set(known))), face


def test_the_one_circle_is_the_plugins():
    """The plug-in imports the engines' adapters, which take from it how a method is wrapped; what they stand on takes
    from it how the key is known.
    """
    known = modules()
    assert imports(known["axiscap_plugin"], set(known)) == {"axiscap.serving.vllm", "axiscap.serving.sglang"}
    users = {module for module, tree in known.items() if "axiscap_plugin" in imports(tree, set(known))}
    assert users == {f"axiscap.serving.{name}" for name in ("vllm", "sglang", "door", "kv", "settings")}
