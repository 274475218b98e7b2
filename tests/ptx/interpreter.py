"""Runs PTX in NumPy: every lane of a block at once, the lowest program counter first, and watches what it does.

The kernels' PTX, as nvcc emits it, is executed on buffers of real bytes. An access outside its allocation or not on
its own size, a read of bytes that nobody wrote, two threads at one byte without a barrier between them, a barrier or
shuffle that not all of its lanes reach, bytes used while an asynchronous copy of them is under way, an access before
the wait for the grid that may still be writing, and an opcode that is not known here: each is an error that says where.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

WARP = 32
SECTOR = 32

_BITS = {"pred": bool, "8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}
_TYPES = {
    **{f"b{n}": _BITS[str(n)] for n in (8, 16, 32, 64)},
    **{f"u{n}": _BITS[str(n)] for n in (8, 16, 32, 64)},
    **{f"s{n}": getattr(np, f"int{n}") for n in (8, 16, 32, 64)},
    "f32": np.float32,
    "f64": np.float64,
    "pred": bool,
}


class PtxError(Exception):
    """What a kernel did that it may not."""


@dataclass(frozen=True)
class Instruction:
    op: str
    operands: tuple[str, ...]
    guard: str | None
    negated: bool
    line: str


@dataclass
class Kernel:
    name: str
    parameters: list[tuple[str, int]]
    registers: dict[str, type]  # prefix -> the unsigned type of its width
    shared: dict[str, int]  # name -> offset
    shared_bytes: int
    code: list[Instruction]
    labels: dict[str, int]
    architecture: int


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a PTX module, by (mangled) name."""
    text = re.sub(r"//[^\n]*", "", text)
    module_shared = re.findall(r"^\.shared \.align (\d+) \.b8 (\S+)\[(\d+)\];", text, re.M)
    dynamic_shared = re.findall(r"^\.extern \.shared \.align (\d+) \.b8 (\S+)\[\];", text, re.M)
    architecture = int(re.search(r"^\.target sm_(\d+)", text, re.M).group(1))
    kernels = {}
    for match in re.finditer(r"\.entry (\S+)\((.*?)\)\s*((?:\.\w+[^{]*)?)\{(.*?)^\}", text, re.S | re.M):
        name, parameters, _, body = match.groups()
        sizes = [(p, int(n)) for p, n in re.findall(r"\.param \.align \d+ \.b8 (\S+)\[(\d+)\]", parameters)]
        registers = {f"%{prefix}": _BITS[width] for width, prefix in re.findall(r"\.reg \.[bf]?(\w+)\s+%(\w+)<", body)}
        shared, end = {}, 0
        own = re.findall(r"\.shared \.align (\d+) \.b8 (\S+)\[(\d+)\];", body)
        for align, variable, size in [entry for entry in module_shared if entry[1] in body] + own:
            end = -(-end // int(align)) * int(align)
            shared[variable] = end
            end += int(size)
        for align, variable in dynamic_shared:  # behind the rest, as long as the launch makes it
            if variable in body:
                end = -(-end // int(align)) * int(align)
                shared[variable] = end
        code, labels = [], {}
        body = re.sub(r"^\s*\.(reg|shared|pragma)[^;]*;", "", body, flags=re.M)
        # Inline assembly stands in braces of its own.
        body = re.sub(r"^\s*\{\s*([^{}\n]*;)\s*\}", r"\1", body, flags=re.M)
        for statement in re.findall(r"\$\S+:|[^;\s][^;]*;", body):
            if statement.endswith(":"):
                labels[statement[:-1]] = len(code)
                continue
            while found := re.match(r"(\$\S+):\s*", statement):
                labels[found.group(1)] = len(code)
                statement = statement[found.end() :]
            line = " ".join(statement[:-1].split())
            guard = re.match(r"@(!?)(%\w+)\s+", line)
            rest = line[guard.end() :] if guard else line
            op, _, tail = rest.partition(" ")
            operands = tuple(part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", tail))
            code.append(Instruction(op, operands, guard and guard.group(2), bool(guard and guard.group(1)), line))
        kernels[name] = Kernel(name, sizes, registers, shared, end, code, labels, architecture)
    return kernels


@dataclass
class Buffer:
    """One allocation, or a block's shared memory: bytes, which of them were written, and who touched them last."""

    name: str
    base: int
    data: np.ndarray
    written: np.ndarray
    writer: np.ndarray  # thread + 1 over the whole grid, 0 for none
    write_time: np.ndarray  # (block, epoch) as one number
    reader: np.ndarray  # like writer; -1: several
    read_time: np.ndarray
    copying: np.ndarray  # asynchronous copies to or from here that nobody has waited for
    sectors: Counter = field(default_factory=Counter)  # moved by the requests of warps, by "ld" and "st"
    requested: Counter = field(default_factory=Counter)  # bytes
    touched: dict[str, set[int]] = field(default_factory=lambda: {"ld": set(), "st": set()})  # distinct sectors

    @classmethod
    def of(cls, name: str, base: int, data: np.ndarray, written: bool) -> Buffer:
        size = len(data)
        zeros = [np.zeros(size, np.int64) for _ in range(4)]
        return cls(name, base, data, np.full(size, written), *zeros, np.zeros(size, np.int16))


class Memory:
    """Global memory: allocations with unmapped space between them."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._next = 1 << 32

    def add(self, name: str, array: np.ndarray, *, written: bool = True, at: int | None = None) -> int:
        """Maps a contiguous array (not copied: the kernel changes it), and returns its address: `at`, behind all that
        is mapped so far, or a multiple of 256.
        """
        data = array.reshape(-1).view(np.uint8)
        base = self._next if at is None else at
        self.buffers.append(Buffer.of(name, base, data, written))
        self._next = max(self._next, -(-(base + len(data) + 4096) // 256) * 256)
        return base

    def find(self, address: int) -> Buffer | None:
        return next((b for b in self.buffers if b.base <= address < b.base + len(b.data)), None)

    def __getitem__(self, name: str) -> Buffer:
        return next(b for b in self.buffers if b.name == name)


def _round_to_odd_then_float(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float32 with one rounding: the product is exact in float64, the sum is rounded to odd there, so that
    the last rounding sees on which side of a tie it lies (Boldo and Melquiond, 2008)."""
    product, c64 = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c64
    part = total - product
    error = (product - (total - part)) + (c64 - part)
    bits = total.view(np.int64).copy()
    inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    towards = np.where((error > 0) == (total > 0), 1, -1)
    bits[inexact] += towards[inexact]
    return bits.view(np.float64).astype(np.float32)


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint32)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded)


def _to_float16(x: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x), np.uint32(0x7FFF), x.astype(np.float16).view(np.uint16).astype(np.uint32))


#: What E4M3 can hold from 0 to its largest, and what lies halfway between.
_FP8 = np.array([(m / 8 if e == 0 else 1 + m / 8) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8)][:-1])
_FP8_TIES = (_FP8[1:] + _FP8[:-1]) / 2


def _to_fp8(x: np.ndarray) -> np.ndarray:
    size = np.minimum(np.abs(x).astype(np.float64), _FP8[-1])
    code = np.searchsorted(_FP8_TIES, size)  # the lower one of a tie
    code += (np.append(_FP8_TIES, np.inf)[np.minimum(code, len(_FP8_TIES))] == size) & (code % 2 == 1)
    return (np.where(np.isnan(x), 0x7F, code) | np.signbit(x).astype(np.int64) << 7).astype(np.uint16)


_COMPARE = {
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "ne": lambda a, b: (a != b) & (a == a) & (b == b),  # false where one is NaN, like the others
    "neu": np.not_equal, "equ": lambda a, b: (a == b) | (a != a) | (b != b),
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b), "num": lambda a, b: (a == a) & (b == b),
}  # fmt: skip


@dataclass
class Copy:
    """An asynchronous copy of 16 bytes a lane into shared memory, not yet waited for."""

    lanes: np.ndarray
    group: np.ndarray  # of each lane
    source: Buffer | None  # None where no lane asks for a byte
    source_at: np.ndarray
    to: np.ndarray
    length: np.ndarray  # bytes to copy; the rest become zeros


class Block:
    """One block in the middle of a launch: a program counter and registers for each of its lanes."""

    def __init__(self, launch: Launch, index: tuple[int, int]) -> None:
        self.launch, self.index, kernel = launch, index, launch.kernel
        self.threads = launch.block
        self.number = index[1] * launch.grid[0] + index[0]
        self.pc = np.zeros(self.threads, np.int64)
        self.live = np.ones(self.threads, bool)
        self.at_barrier = np.zeros(self.threads, bool)
        self.stuck = np.zeros(self.threads, bool)  # at a shuffle, for lanes that are not there yet
        self.epoch = 1
        self.lane = np.arange(self.threads)
        self.registers: dict[str, np.ndarray] = {}
        self.shared = Buffer.of("shared", 0, np.zeros(max(kernel.shared_bytes + launch.dynamic, 1), np.uint8), False)
        self.copies: list[Copy] = []
        self.committed = np.zeros(self.threads, np.int64)  # groups of copies
        # A grid that does not start early has everything before it behind it.
        self.waited = np.full(self.threads, not launch.early)

    # Registers and operands.

    def register(self, name: str) -> np.ndarray:
        found = self.registers.get(name)
        if found is None:
            prefix = re.match(r"%[a-z]+", name).group()
            if prefix not in self.launch.kernel.registers:
                raise PtxError(f"unknown register {name}")
            found = self.registers[name] = np.zeros(self.threads, self.launch.kernel.registers[prefix])
        return found

    def value(self, operand: str, kind: type) -> np.ndarray:
        special = {"%tid.x": self.lane, "%ntid.x": self.threads, "%ctaid.x": self.index[0], "%ctaid.y": self.index[1],
                   "%nctaid.x": self.launch.grid[0]}  # fmt: skip
        if operand in special:
            return np.broadcast_to(np.asarray(special[operand], np.uint32), self.threads).astype(np.uint32).view(kind)
        if operand.startswith("%"):
            found = self.register(operand)
            if kind is bool or found.dtype == bool:
                return found
            if found.dtype.itemsize != np.dtype(kind).itemsize:
                return found.astype(f"u{np.dtype(kind).itemsize}").view(kind)
            return found.view(kind)
        if operand.startswith("0f"):
            number = np.array(int(operand[2:], 16), np.uint32).view(np.float32)
        elif operand.startswith("0d"):
            number = np.array(int(operand[2:], 16), np.uint64).view(np.float64)
        elif operand in self.launch.parameter_at:
            number = np.array(self.launch.parameter_at[operand], np.uint64)
        elif operand in self.launch.kernel.shared:
            number = np.array(self.launch.kernel.shared[operand])
        else:
            number = np.array(int(operand, 0) & ((1 << 64) - 1), np.uint64)
        if number.dtype.kind == "f":
            return np.broadcast_to(number, self.threads).view(kind)
        return np.broadcast_to(number.astype(f"u{np.dtype(kind).itemsize}").view(kind), self.threads)

    def put(self, operand: str, value: np.ndarray, mask: np.ndarray) -> None:
        target = self.register(operand)
        if value.dtype.kind in "iu" and value.dtype.itemsize != target.dtype.itemsize:
            value = value.astype(target.dtype)
        elif value.dtype != target.dtype:
            value = np.ascontiguousarray(value).view(target.dtype)
        np.copyto(target, value, where=mask)

    # One instruction, for the lanes of `mask`.

    def step(self, mask: np.ndarray) -> None:
        pc = int(self.pc[mask][0])
        instruction = self.launch.kernel.code[pc]
        active = mask
        if instruction.guard is not None:
            active = mask & (self.register(instruction.guard) ^ instruction.negated)
        try:
            with np.errstate(all="ignore"):
                self.execute(instruction, active, mask, pc)
        except PtxError as error:
            raise PtxError(f"{error} (block {self.index}, at '{instruction.line}')") from None

    def execute(self, instruction: Instruction, active: np.ndarray, mask: np.ndarray, pc: int) -> None:
        op, operands = instruction.op, instruction.operands
        parts = op.split(".")
        root = parts[0]
        warps = np.add.reduceat(active, np.arange(0, self.threads, WARP)) > 0
        if root == "bra":
            self.pc[mask] = pc + 1
            self.pc[active] = self.launch.kernel.labels[operands[0]]
        elif root == "ret":
            self.live &= ~active
            self.pc[mask & ~active] = pc + 1
        elif root == "bar":
            self.at_barrier |= active
            self.pc[mask] = pc + 1
        elif root in ("shfl", "vote"):
            if not self.exchange(root, parts, operands, active):
                self.pc[mask & ~active] = pc + 1
                return
            self.pc[mask] = pc + 1
        else:
            self.pc[mask] = pc + 1
            if active.any():
                if root in ("ld", "st"):
                    self.access(root, parts, operands, active)
                elif root == "cp":
                    self.copy(op, operands, active)
                elif op == "griddepcontrol.wait":
                    self.waited |= active
                elif op == "mov.b64" and operands[0].startswith("{"):
                    whole = self.value(operands[1], np.uint64)
                    for half, name in enumerate(operands[0].strip("{}").split(",")):
                        self.put(name.strip(), (whole >> np.uint64(32 * half)).astype(np.uint32), active)
                elif op != "griddepcontrol.launch_dependents":
                    self.put(operands[0], self.compute(op, parts, operands), active)
        self.launch.counts[op] += int(warps.sum())

    def exchange(self, root: str, parts: list[str], operands: tuple[str, ...], active: np.ndarray) -> bool:
        members = self.value(operands[-1], np.uint32)
        for start in range(0, self.threads, WARP):
            here = active[start : start + WARP]
            if not here.any():
                continue
            named = (int(members[start + int(here.argmax())]) >> np.arange(WARP)) & 1 == 1
            if not here[named].all():
                if (~self.live[start : start + WARP])[named].any():
                    raise PtxError("a shuffle names lanes that have ended")
                self.stuck[start : start + WARP] |= here
                return False
        if root == "vote":
            value = self.register(operands[1]) & active
            result = np.repeat(np.logical_or.reduceat(value, np.arange(0, self.threads, WARP)), WARP)
            self.put(operands[0], result, active)
        else:
            destination = operands[0].split("|")[0]
            if parts[2] != "bfly" or (self.value(operands[3], np.uint32)[active] != WARP - 1).any():
                raise PtxError("a shuffle that is not known here")
            partner = self.lane ^ self.value(operands[2], np.uint32).astype(np.int64)
            self.put(destination, self.value(operands[1], np.uint32)[partner], active)
        return True

    def compute(self, op: str, parts: list[str], operands: tuple[str, ...]) -> np.ndarray:
        root, kind = parts[0], _TYPES.get(parts[-1])

        def get(i: int, as_type: type | None = None) -> np.ndarray:
            return self.value(operands[i], as_type or kind)

        if op.startswith("cvt.rn.bf16x2.f32"):
            high, low = _to_bfloat16(get(1, np.float32)), _to_bfloat16(get(2, np.float32))
            return (high << np.uint32(16)) | low
        if op.startswith("cvt.rn.f16x2.f32"):
            high, low = _to_float16(get(1, np.float32)), _to_float16(get(2, np.float32))
            return (high << np.uint32(16)) | low
        if op == "cvt.rn.satfinite.e4m3x2.f32":
            high, low = _to_fp8(get(1, np.float32)), _to_fp8(get(2, np.float32))
            return (high << np.uint16(8)) | low
        if op == "cvt.f32.f16":
            return get(1, np.uint16).view(np.float16).astype(np.float32)
        if root == "cvt" and len(parts) == 3 and kind is not None:
            return get(1, _TYPES[parts[2]]).astype(_TYPES[parts[1]])
        if root == "cvta":
            return get(1, np.uint64)
        if root == "mov":
            if operands[1].startswith("{"):
                half, whole = (np.uint32, np.uint64) if op == "mov.b64" else (np.uint16, np.uint32)
                low, high = (self.value(name.strip(), half) for name in operands[1].strip("{}").split(","))
                return low | high.astype(whole) << whole(np.dtype(half).itemsize * 8)
            return get(1)
        if root == "setp" and len(parts) == 3:
            return _COMPARE[parts[1]](get(1), get(2))
        if root == "selp":
            return np.where(self.register(operands[3]), get(1), get(2))
        if op == "fma.rn.f32":
            return _round_to_odd_then_float(get(1), get(2), get(3))
        if root == "mul" and parts[1] == "wide":
            wide = np.int64 if parts[2] == "s32" else np.uint64
            return get(1).astype(wide) * get(2).astype(wide)
        if root == "mad" and parts[1] == "lo":
            return get(1) * get(2) + get(3)
        if root in ("add", "sub") or (root == "mul" and parts[1] in ("lo", "f32", "rn")):
            return {"add": np.add, "sub": np.subtract, "mul": np.multiply}[root](get(1), get(2))
        if root in ("div", "rem") and kind is not None and np.dtype(kind).kind in "iu":
            a, b = get(1), get(2)
            if kind is np.int64 and ((a < 0) | (b <= 0)).any():
                raise PtxError("a signed division that is not known here")
            return a // b if root == "div" else a % b
        if root in ("and", "or", "xor"):
            return {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[root](get(1), get(2))
        if root == "not":
            return ~get(1)
        if root in ("shl", "shr"):
            amount = self.value(operands[2], np.uint32)
            width = np.dtype(kind).itemsize * 8
            shifted = (np.left_shift if root == "shl" else np.right_shift)(
                get(1), np.minimum(amount, width - 1).astype(kind)
            )
            return shifted if bool((amount < width).all()) else np.where(amount < width, shifted, kind(0))
        if root in ("min", "max") and len(parts) == 2:
            return {"min": np.fmin, "max": np.fmax}[root](get(1), get(2))
        if root == "abs" and len(parts) == 2:
            return np.abs(get(1))
        if root == "neg" and len(parts) == 2:
            return -get(1)
        if op == "div.rn.f32":
            return get(1) / get(2)
        if op == "rcp.rn.f32":
            return 1 / get(1)
        if op == "rsqrt.approx.f32":
            return (1 / np.sqrt(get(1).astype(np.float64))).astype(np.float32)
        raise PtxError(f"unknown opcode {op}")

    # Memory.

    def access(self, root: str, parts: list[str], operands: tuple[str, ...], active: np.ndarray) -> None:
        space, kind = parts[1], _TYPES.get(parts[-1])
        known = {"global", "param", "shared", "nc", "v2", "v4", "L1::no_allocate"}
        if kind is None or any(part not in known for part in parts[1:-1]):
            raise PtxError(f"unknown opcode {'.'.join(parts)}")
        address_text, registers = (operands[1], operands[0]) if root == "ld" else (operands[0], operands[1])
        names = registers.strip("{}").replace(" ", "").split(",")
        base, _, shift = address_text.strip("[]").partition("+")
        address = self.value(base, np.uint64).astype(np.int64) + (int(shift) if shift else 0)
        unit = np.dtype(kind).itemsize
        size = unit * len(names)
        lanes = np.flatnonzero(active)
        wanted = address[lanes]
        if (wanted % size).any():
            raise PtxError(f"an access of {size} bytes at {wanted[wanted % size != 0][0]:#x}, which it does not divide")
        if space == "global":
            self.check_waited(active)
        if space == "param":
            buffer, block = self.launch.parameters, False
        elif space == "shared":
            buffer, block = self.shared, True
        else:
            buffer, block = self.launch.memory.find(int(wanted[0])), True
            if buffer is None:
                raise PtxError(f"an access at {wanted[0]:#x}, where nothing is")
        offsets = wanted - buffer.base
        if (offsets < 0).any() or (offsets + size > len(buffer.data)).any():
            raise PtxError(f"an access outside of {buffer.name}: byte {offsets.min()} to {offsets.max() + size}")
        where = offsets[:, None] + np.arange(size)
        if block:
            self.watch(buffer, root, where, lanes)
        if space == "global":
            self.count(buffer, root, where, lanes)
        if root == "ld":
            values = buffer.data[where]
            for i, name in enumerate(names):
                raw = np.ascontiguousarray(values[:, i * unit : (i + 1) * unit]).view(f"u{unit}")[:, 0]
                target = self.register(name)
                if np.dtype(kind).kind == "i":
                    raw = raw.view(kind).astype(f"i{target.dtype.itemsize}").view(target.dtype)
                target[lanes] = raw.astype(target.dtype)
        else:
            for i, name in enumerate(names):
                raw = np.ascontiguousarray(self.value(name, f"u{unit}" if unit > 1 else np.uint8)[lanes])
                buffer.data[where[:, i * unit : (i + 1) * unit]] = raw[:, None].view(np.uint8)

    def check_waited(self, active: np.ndarray) -> None:
        """Of any memory: a caller may have made axes, floors and slots by the very kernel before."""
        if not self.waited[active].all():
            raise PtxError("an access to memory before the wait for the kernel that may be writing there")

    def copy(self, op: str, operands: tuple[str, ...], active: np.ndarray) -> None:
        """cp.async. The bytes arrive when they are waited for, no earlier: whoever looks before is told."""
        lanes = np.flatnonzero(active)
        if op == "cp.async.commit_group":
            self.committed[lanes] += 1
        elif op == "cp.async.wait_group":
            for copy in self.copies:
                done = active[copy.lanes] & (copy.group < self.committed[copy.lanes] - int(operands[0]))
                self.arrive(copy, done)
            self.copies = [copy for copy in self.copies if len(copy.lanes)]
        elif op == "cp.async.cg.shared.global" and operands[2] == "16":
            to = self.value(operands[0].strip("[]"), np.uint64).astype(np.int64)[lanes]
            address = self.value(operands[1].strip("[]"), np.uint64).astype(np.int64)[lanes]
            length = self.value(operands[3], np.uint32).astype(np.int64)[lanes]
            asked = length > 0
            self.check_waited(active)
            if (to % 16).any() or (address[asked] % 16).any() or (length > 16).any():
                raise PtxError("a copy that is not 16 bytes at a multiple of 16")
            if (to + 16 > len(self.shared.data)).any():
                raise PtxError(f"an access outside of shared: byte {to.max()}")
            where = to[:, None] + np.arange(16)
            self.watch(self.shared, "st", where, lanes)
            self.shared.written[where] = False
            self.shared.copying[where] += 1
            source = None
            if asked.any():
                source = self.launch.memory.find(int(address[asked][0]))
                if source is None:
                    raise PtxError(f"an access at {address[asked][0]:#x}, where nothing is")
                address = address - source.base
                if (address[asked] < 0).any() or (address + length > len(source.data))[asked].any():
                    raise PtxError(f"an access outside of {source.name}: byte {address[asked].max()}")
                read = address[asked][:, None] + np.arange(16)
                if (length[asked] != 16).any():
                    raise PtxError("a copy of part of its bytes, which is not known here")
                self.watch(source, "ld", read, lanes[asked])
                source.copying[read] += 1
                self.count(source, "ld", read, lanes[asked])
            self.copies.append(Copy(lanes, self.committed[lanes].copy(), source, address, to, length))
        else:
            raise PtxError(f"unknown opcode {op}")

    def arrive(self, copy: Copy, done: np.ndarray) -> None:
        where = copy.to[done][:, None] + np.arange(16)
        asked = done & (copy.length > 0)
        self.shared.data[where] = 0
        if copy.source is not None and asked.any():
            read = copy.source_at[asked][:, None] + np.arange(16)
            self.shared.data[copy.to[asked][:, None] + np.arange(16)] = copy.source.data[read]
            copy.source.copying[read] -= 1
        self.shared.written[where] = True
        self.shared.copying[where] -= 1
        for name in ("lanes", "group", "source_at", "to", "length"):
            setattr(copy, name, getattr(copy, name)[~done])

    def count(self, buffer: Buffer, root: str, where: np.ndarray, lanes: np.ndarray) -> None:
        """Adds up the sectors that each warp's request moves."""
        for start in range(0, self.threads, WARP):
            mine = (lanes >= start) & (lanes < start + WARP)
            if mine.any():
                moved = np.unique((buffer.base + where[mine]) // SECTOR)
                buffer.sectors[root] += len(moved)
                buffer.touched[root].update(moved.tolist())
                buffer.requested[root] += int(mine.sum()) * where.shape[1]

    def watch(self, buffer: Buffer, root: str, where: np.ndarray, lanes: np.ndarray) -> None:
        now = (self.number << 32) | self.epoch
        thread = (self.number * self.threads + lanes + 1)[:, None]

        # Ordered by a barrier: the same block, an earlier epoch.
        def unordered(who: np.ndarray, when: np.ndarray) -> np.ndarray:
            before = (when >> 32 == self.number) & (when < now)
            return (who != 0) & (who != thread) & ~before

        if buffer.copying[where].any() and (root == "st" or buffer is self.shared):
            raise PtxError(f"{buffer.name} is used while it is being copied")
        if unordered(buffer.writer[where], buffer.write_time[where]).any():
            raise PtxError(f"a race: {buffer.name} was written by another thread, with no barrier since")
        if root == "ld":
            if not buffer.written[where].all():
                raise PtxError(f"a read of {buffer.name} where nothing was written")
            several = unordered(buffer.reader[where], buffer.read_time[where])
            buffer.reader[where] = np.where(several, -1, thread)
            flat, count = np.unique(where, return_counts=True)
            buffer.reader[flat[count > 1]] = -1
            buffer.read_time[where] = now
            return
        if unordered(buffer.reader[where], buffer.read_time[where]).any():
            raise PtxError(f"a race: {buffer.name} was read by another thread, with no barrier since")
        if len(np.unique(where)) != where.size:
            raise PtxError(f"a race: two threads write the same byte of {buffer.name}")
        buffer.written[where] = True
        buffer.writer[where] = thread
        buffer.write_time[where] = now

    # Scheduling.

    def run(self, random: np.random.Generator | None) -> None:
        """Runs to the end: all lanes by lowest program counter, or, given a generator, warp by warp in its order."""
        while self.live.any():
            self.release()
            group = ready = self.live & ~self.at_barrier & ~self.stuck
            if not ready.any():
                self.pass_barrier()
                continue
            if random is not None:
                group = ready & (self.lane // WARP == random.choice(np.unique(self.lane[ready] // WARP)))
            for _ in range(1 if random is None else random.integers(1, 64)):
                self.step(group & (self.pc == self.pc[group].min()))
                group &= self.live & ~self.at_barrier & ~self.stuck
                if not group.any():
                    break

    def pass_barrier(self) -> None:
        if self.stuck.any():
            raise PtxError(f"block {self.index}: a shuffle under divergence: not all of its lanes come to it")
        if not self.live.all():
            raise PtxError(f"block {self.index}: a barrier that threads which have ended never reach")
        if len(np.unique(self.pc)) > 1:
            raise PtxError(f"block {self.index}: threads wait at different barriers")
        self.at_barrier[:] = False
        self.epoch += 1

    def release(self) -> None:
        """Lets lanes that wait at a shuffle go on once their whole warp stands there."""
        if self.stuck.any():
            for start in range(0, self.threads, WARP):
                if len(np.unique(self.pc[start : start + WARP])) == 1:
                    self.stuck[start : start + WARP] = False


class Launch:
    """A kernel with its parameters and memory, ready to run."""

    def __init__(
        self,
        kernel: Kernel,
        memory: Memory,
        parameters: bytes,
        grid: tuple[int, int],
        block: int,
        dynamic: int = 0,  # bytes of shared memory beside those that the kernel names
        early: bool = False,  # by programmatic dependent launch, while the kernel before is at work
    ) -> None:
        self.kernel, self.memory, self.grid, self.block, self.dynamic = kernel, memory, grid, block, dynamic
        self.early = early
        ((name, size),) = kernel.parameters
        if len(parameters) != size:
            raise ValueError(f"the kernel takes {size} bytes of parameters, got {len(parameters)}")
        self.parameters = Buffer.of("parameters", 0, np.frombuffer(bytearray(parameters), np.uint8), True)
        self.parameter_at = {name: 0}
        self.counts: Counter[str] = Counter()

    def run(self, seed: int | None = None) -> None:
        """Blocks in order and lanes together, or, given a seed, blocks and warps in an order drawn from it."""
        random = None if seed is None else np.random.default_rng(seed)
        blocks = [(x, y) for y in range(self.grid[1]) for x in range(self.grid[0])]
        if random is not None:
            random.shuffle(blocks)
        for index in blocks:
            Block(self, tuple(int(i) for i in index)).run(random)
