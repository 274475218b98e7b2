"""Parses a PTX module into kernels."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

_BITS = {"pred": bool, "8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}
#: The NumPy type of each PTX type.
TYPES = {
    **{f"b{n}": _BITS[str(n)] for n in (8, 16, 32, 64)},
    **{f"u{n}": _BITS[str(n)] for n in (8, 16, 32, 64)},
    **{f"s{n}": getattr(np, f"int{n}") for n in (8, 16, 32, 64)},
    "f32": np.float32,
    "f64": np.float64,
    "pred": bool,
}


class PtxError(Exception):
    """A kernel does something forbidden, or something that the interpreter does not know."""


@dataclass(frozen=True)
class Instruction:
    """One instruction, such as ``@!%p1 bra $L1`` with op "bra", operands ("$L1",), guard "%p1" and negated True."""

    op: str
    operands: tuple[str, ...]
    guard: str | None
    negated: bool
    line: str


@dataclass
class Kernel:
    """One entry of a module. registers: prefix -> unsigned type; shared: variable -> offset; labels: name -> index."""

    name: str
    parameters: list[tuple[str, int]]
    registers: dict[str, type]
    shared: dict[str, int]
    shared_bytes: int
    code: list[Instruction]
    labels: dict[str, int]
    architecture: int


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a PTX module, by (mangled) name."""
    text = re.sub(r"//[^\n]*", "", text)
    architecture = int(re.search(r"^\.target sm_(\d+)", text, re.M).group(1))
    static = re.findall(r"^\.shared \.align (\d+) \.b8 (\S+)\[(\d+)\];", text, re.M)
    dynamic = re.findall(r"^\.extern \.shared \.align (\d+) \.b8 (\S+)\[\];", text, re.M)
    kernels = {}
    for match in re.finditer(r"\.entry (\S+)\((.*?)\)\s*((?:\.\w+[^{]*)?)\{(.*?)^\}", text, re.S | re.M):
        name, parameters, _, body = match.groups()
        sizes = [(p, int(n)) for p, n in re.findall(r"\.param \.align \d+ \.b8 (\S+)\[(\d+)\]", parameters)]
        registers = {f"%{prefix}": _BITS[width] for width, prefix in re.findall(r"\.reg \.[bf]?(\w+)\s+%(\w+)<", body)}
        shared, shared_bytes = _shared_variables(body, static, dynamic)
        code, labels = _statements(body)
        kernels[name] = Kernel(name, sizes, registers, shared, shared_bytes, code, labels, architecture)
    return kernels


def _shared_variables(body: str, static: list, dynamic: list) -> tuple[dict[str, int], int]:
    """The offsets of a kernel's shared variables, and the bytes of all but the dynamic ones.

    static, dynamic
        the variables of the module: (alignment, name, size) and (alignment, name).
    """
    local = re.findall(r"\.shared \.align (\d+) \.b8 (\S+)\[(\d+)\];", body)
    offsets, end = {}, 0
    for align, variable, size in [entry for entry in static if entry[1] in body] + local:
        end = -(-end // int(align)) * int(align)
        offsets[variable] = end
        end += int(size)
    for align, variable in dynamic:  # behind the static variables; the launch sets the size
        if variable in body:
            end = -(-end // int(align)) * int(align)
            offsets[variable] = end
    return offsets, end


def _statements(body: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of a kernel's body, and the labels with the index of the instruction behind them."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    body = re.sub(r"^\s*\.(reg|shared|pragma)[^;]*;", "", body, flags=re.M)
    # Inline assembly is in braces of its own.
    body = re.sub(r"^\s*\{\s*([^{}\n]*;)\s*\}", r"\1", body, flags=re.M)
    for statement in re.findall(r"\$\S+:|[^;\s][^;]*;", body):
        if statement.endswith(":"):
            labels[statement[:-1]] = len(code)
            continue
        while label := re.match(r"(\$\S+):\s*", statement):
            labels[label.group(1)] = len(code)
            statement = statement[label.end() :]
        code.append(_instruction(" ".join(statement[:-1].split())))
    return code, labels


def _instruction(line: str) -> Instruction:
    guard = re.match(r"@(!?)(%\w+)\s+", line)
    op, _, tail = (line[guard.end() :] if guard else line).partition(" ")
    operands = tuple(part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", tail))
    return Instruction(op, operands, guard and guard.group(2), bool(guard and guard.group(1)), line)
