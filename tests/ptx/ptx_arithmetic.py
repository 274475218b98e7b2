"""The results of PTX instructions that read registers alone: conversions, comparisons and arithmetic of all lanes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from ptx_module import TYPES, PtxError

#: Reads an operand of all lanes as a type.
Value = Callable[[str, type], np.ndarray]


def compute(op: str, operands: tuple[str, ...], value: Value) -> np.ndarray:
    """The result of an instruction whose first operand is the destination."""
    family = _FAMILIES.get(op.partition(".")[0])
    result = None if family is None else family(op, operands, value)
    if result is None:
        raise PtxError(f"unknown opcode {op}")
    return result


# One function for each family of ops. It returns None for an unknown op. The last part of an op is a type.


def _convert(op: str, operands: tuple[str, ...], value: Value) -> np.ndarray | None:
    parts = op.split(".")
    for prefix, convert, width in (
        ("cvt.rn.bf16x2.f32", _to_bfloat16, np.uint32(16)),
        ("cvt.rn.f16x2.f32", _to_float16, np.uint32(16)),
        ("cvt.rn.satfinite.e4m3x2.f32", _to_fp8, np.uint16(8)),
    ):
        if op.startswith(prefix):
            high, low = (convert(value(operands[i], np.float32)) for i in (1, 2))
            return (high << width) | low
    if op == "cvt.f32.f16":
        return value(operands[1], np.uint16).view(np.float16).astype(np.float32)
    if parts[0] == "cvt" and len(parts) == 3 and parts[2] in TYPES:
        return value(operands[1], TYPES[parts[2]]).astype(TYPES[parts[1]])
    if parts[0] == "cvta":
        return value(operands[1], np.uint64)
    return None


def _move(op: str, operands: tuple[str, ...], value: Value) -> np.ndarray | None:
    parts = op.split(".")
    kind = TYPES.get(parts[-1])
    if parts[0] == "mov" and operands[1].startswith("{"):
        half, whole = (np.uint32, np.uint64) if op == "mov.b64" else (np.uint16, np.uint32)
        low, high = (value(name.strip(), half) for name in operands[1].strip("{}").split(","))
        return low | high.astype(whole) << whole(np.dtype(half).itemsize * 8)
    if parts[0] == "mov":
        return value(operands[1], kind)
    if parts[0] == "setp" and len(parts) == 3:
        return _COMPARE[parts[1]](value(operands[1], kind), value(operands[2], kind))
    if parts[0] == "selp":
        return np.where(value(operands[3], bool), value(operands[1], kind), value(operands[2], kind))
    return None


def _add_or_multiply(op: str, operands: tuple[str, ...], value: Value) -> np.ndarray | None:
    root, *parts = op.split(".")
    if parts[-1] not in TYPES:
        return None
    a, b, *c = (value(operand, TYPES[parts[-1]]) for operand in operands[1:])
    if op == "fma.rn.f32":
        return _multiply_add(a, b, *c)
    if root == "mul" and parts[0] == "wide":
        wide = np.int64 if parts[1] == "s32" else np.uint64
        return a.astype(wide) * b.astype(wide)
    if root == "mad" and parts[0] == "lo":
        return a * b + c[0]
    if root in ("add", "sub") or (root == "mul" and parts[0] in ("lo", "f32", "rn")):
        return {"add": np.add, "sub": np.subtract, "mul": np.multiply}[root](a, b)
    return None


def _divide(op: str, operands: tuple[str, ...], value: Value) -> np.ndarray | None:
    root, *_, suffix = op.split(".")
    kind = TYPES.get(suffix)
    if op == "div.rn.f32":
        return value(operands[1], kind) / value(operands[2], kind)
    if kind is None or np.dtype(kind).kind not in "iu":
        return None
    a, b = value(operands[1], kind), value(operands[2], kind)
    if kind is np.int64 and ((a < 0) | (b <= 0)).any():
        raise PtxError("a signed division that is not known here")
    return a // b if root == "div" else a % b


_COMBINE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "min": np.fmin, "max": np.fmax}


def _combine(op: str, operands: tuple[str, ...], value: Value) -> np.ndarray | None:
    root, *parts = op.split(".")
    if len(parts) != 1 or parts[0] not in TYPES:
        return None
    return _COMBINE[root](value(operands[1], TYPES[parts[0]]), value(operands[2], TYPES[parts[0]]))


def _shift(op: str, operands: tuple[str, ...], value: Value) -> np.ndarray | None:
    root, *_, suffix = op.split(".")
    kind = TYPES[suffix]
    amount, bits = value(operands[2], np.uint32), np.dtype(kind).itemsize * 8
    shift = np.left_shift if root == "shl" else np.right_shift
    shifted = shift(value(operands[1], kind), np.minimum(amount, bits - 1).astype(kind))
    return shifted if bool((amount < bits).all()) else np.where(amount < bits, shifted, kind(0))


def _unary(op: str, operands: tuple[str, ...], value: Value) -> np.ndarray | None:
    root, *parts = op.split(".")
    kind = TYPES.get(parts[-1])
    if root == "not":
        return ~value(operands[1], kind)
    if root == "abs" and len(parts) == 1:
        return np.abs(value(operands[1], kind))
    if root == "neg" and len(parts) == 1:
        return -value(operands[1], kind)
    if op == "rcp.rn.f32":
        return 1 / value(operands[1], kind)
    if op == "rsqrt.approx.f32":
        return (1 / np.sqrt(value(operands[1], kind).astype(np.float64))).astype(np.float32)
    return None


_FAMILIES = {
    **dict.fromkeys(("cvt", "cvta"), _convert),
    **dict.fromkeys(("mov", "setp", "selp"), _move),
    **dict.fromkeys(("add", "sub", "mul", "mad", "fma"), _add_or_multiply),
    **dict.fromkeys(("div", "rem"), _divide),
    **dict.fromkeys(("and", "or", "xor", "min", "max"), _combine),
    **dict.fromkeys(("shl", "shr"), _shift),
    **dict.fromkeys(("not", "abs", "neg", "rcp", "rsqrt"), _unary),
}


_COMPARE = {
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "ne": lambda a, b: (a != b) & (a == a) & (b == b),  # false if an operand is NaN, like the others
    "neu": np.not_equal, "equ": lambda a, b: (a == b) | (a != a) | (b != b),
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b), "num": lambda a, b: (a == a) & (b == b),
}  # fmt: skip


def _multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float32 with one rounding.

    The product is exact in float64. The sum is rounded to odd in float64, so that the rounding to float32 sees on which
    side of a tie the exact sum lies (Boldo and Melquiond, 2008).
    """
    product, c64 = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c64
    part = total - product
    error = (product - (total - part)) + (c64 - part)
    bits = total.view(np.int64).copy()
    inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    step = np.where((error > 0) == (total > 0), 1, -1)
    bits[inexact] += step[inexact]
    return bits.view(np.float64).astype(np.float32)


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint32)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded)


def _to_float16(x: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x), np.uint32(0x7FFF), x.astype(np.float16).view(np.uint16).astype(np.uint32))


#: The numbers of E4M3 from 0 to the largest, and the ties between them.
_FP8 = np.array([(m / 8 if e == 0 else 1 + m / 8) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8)][:-1])
_FP8_TIES = (_FP8[1:] + _FP8[:-1]) / 2


def _to_fp8(x: np.ndarray) -> np.ndarray:
    magnitude = np.minimum(np.abs(x).astype(np.float64), _FP8[-1])
    code = np.searchsorted(_FP8_TIES, magnitude)  # at a tie the lower number
    code += (np.append(_FP8_TIES, np.inf)[np.minimum(code, len(_FP8_TIES))] == magnitude) & (code % 2 == 1)
    return (np.where(np.isnan(x), 0x7F, code) | np.signbit(x).astype(np.int64) << 7).astype(np.uint16)
