"""Executes PTX in NumPy: all lanes of a block at once, the lowest program counter first, with checks of each access.

The kernels' PTX, as nvcc emits it, runs on buffers of real bytes. Each of these is an error that names the instruction:
an access outside of its allocation or not aligned to its size, a read of bytes that were never written, two threads at
one byte without a barrier between them, a barrier or a shuffle that not all of its lanes reach, an access to bytes that
are being copied asynchronously, an access before the wait for the previous grid, and an unknown opcode.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
from ptx_arithmetic import compute
from ptx_memory import Buffer, Memory
from ptx_module import TYPES, Instruction, Kernel, PtxError

WARP = 32
SECTOR = 32  # bytes; the unit of traffic between the caches and memory
_ACCESS_PARTS = {"global", "param", "shared", "nc", "v2", "v4", "L1::no_allocate"}


@dataclass
class Copy:
    """An unfinished asynchronous copy into shared memory, 16 bytes for each lane. The arrays have an entry a lane.

    length
        bytes to copy, 16 or 0: the lane copies 16 bytes or writes 16 zeros.
    source
        None if no lane copies bytes.
    """

    lanes: np.ndarray
    group: np.ndarray
    source: Buffer | None
    source_offset: np.ndarray
    shared_offset: np.ndarray
    length: np.ndarray


class Block:
    """A running block: a program counter and registers for each of its lanes."""

    def __init__(self, launch: Launch, index: tuple[int, int]) -> None:
        self.launch, self.index, kernel = launch, index, launch.kernel
        self.threads = launch.block
        self.number = index[1] * launch.grid[0] + index[0]
        self.pc = np.zeros(self.threads, np.int64)
        self.live = np.ones(self.threads, bool)
        self.at_barrier = np.zeros(self.threads, bool)
        self.stuck = np.zeros(self.threads, bool)  # waits at a shuffle for other lanes
        self.epoch = 1
        self.lane = np.arange(self.threads)
        self.registers: dict[str, np.ndarray] = {}
        self.shared = Buffer.of("shared", 0, np.zeros(max(kernel.shared_bytes + launch.dynamic, 1), np.uint8), False)
        self.copies: list[Copy] = []
        self.committed = np.zeros(self.threads, np.int64)  # groups of copies
        # A grid that does not start early starts after the previous grid has ended.
        self.waited = np.full(self.threads, not launch.early)

    # Registers and operands.

    def register(self, name: str) -> np.ndarray:
        register = self.registers.get(name)
        if register is None:
            prefix = re.match(r"%[a-z]+", name).group()
            if prefix not in self.launch.kernel.registers:
                raise PtxError(f"unknown register {name}")
            register = self.registers[name] = np.zeros(self.threads, self.launch.kernel.registers[prefix])
        return register

    def value(self, operand: str, kind: type) -> np.ndarray:
        special = {"%tid.x": self.lane, "%ntid.x": self.threads, "%ctaid.x": self.index[0], "%ctaid.y": self.index[1],
                   "%nctaid.x": self.launch.grid[0]}  # fmt: skip
        if operand in special:
            return np.broadcast_to(np.asarray(special[operand], np.uint32), self.threads).astype(np.uint32).view(kind)
        if operand.startswith("%"):
            register = self.register(operand)
            if kind is bool or register.dtype == bool:
                return register
            if register.dtype.itemsize != np.dtype(kind).itemsize:
                return register.astype(f"u{np.dtype(kind).itemsize}").view(kind)
            return register.view(kind)
        if operand.startswith("0f"):
            number = np.array(int(operand[2:], 16), np.uint32).view(np.float32)
        elif operand.startswith("0d"):
            number = np.array(int(operand[2:], 16), np.uint64).view(np.float64)
        elif operand in self.launch.parameter_offsets:
            number = np.array(self.launch.parameter_offsets[operand], np.uint64)
        elif operand in self.launch.kernel.shared:
            number = np.array(self.launch.kernel.shared[operand])
        else:
            number = np.array(int(operand, 0) & ((1 << 64) - 1), np.uint64)
        if number.dtype.kind == "f":
            return np.broadcast_to(number, self.threads).view(kind)
        return np.broadcast_to(number.astype(f"u{np.dtype(kind).itemsize}").view(kind), self.threads)

    def put(self, operand: str, value: np.ndarray, mask: np.ndarray) -> None:
        register = self.register(operand)
        if value.dtype.kind in "iu" and value.dtype.itemsize != register.dtype.itemsize:
            value = value.astype(register.dtype)
        elif value.dtype != register.dtype:
            value = np.ascontiguousarray(value).view(register.dtype)
        np.copyto(register, value, where=mask)

    # One instruction. `mask` are the lanes at its program counter, `active` those of them whose guard is true.

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
                self.execute_on_lanes(op, operands, active)
        self.launch.counts[op] += int(warps.sum())

    def execute_on_lanes(self, op: str, operands: tuple[str, ...], active: np.ndarray) -> None:
        """An instruction without effect on the program counter or on other lanes."""
        root = op.partition(".")[0]
        if root in ("ld", "st"):
            self.access(op, operands, active)
        elif root == "cp":
            self.copy(op, operands, active)
        elif op == "griddepcontrol.wait":
            self.waited |= active
        elif op == "mov.b64" and operands[0].startswith("{"):
            whole = self.value(operands[1], np.uint64)
            for half, name in enumerate(operands[0].strip("{}").split(",")):
                self.put(name.strip(), (whole >> np.uint64(32 * half)).astype(np.uint32), active)
        elif op != "griddepcontrol.launch_dependents":
            self.put(operands[0], compute(op, operands, self.value), active)

    def exchange(self, root: str, parts: list[str], operands: tuple[str, ...], active: np.ndarray) -> bool:
        """A shuffle or vote. Returns False if a warp waits for lanes that have not reached it."""
        masks = self.value(operands[-1], np.uint32)
        for start in range(0, self.threads, WARP):
            warp_active = active[start : start + WARP]
            if not warp_active.any():
                continue
            members = (int(masks[start + int(warp_active.argmax())]) >> np.arange(WARP)) & 1 == 1
            if not warp_active[members].all():
                if (~self.live[start : start + WARP])[members].any():
                    raise PtxError("a shuffle names lanes that have ended")
                self.stuck[start : start + WARP] |= warp_active
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

    # Memory.

    # `offsets` are the bytes of each lane's access in the buffer, (lanes, bytes); `root` is "ld" or "st".

    def access(self, op: str, operands: tuple[str, ...], active: np.ndarray) -> None:
        root, space, *modifiers, suffix = op.split(".")
        kind = TYPES.get(suffix)
        if kind is None or not {space, *modifiers} <= _ACCESS_PARTS:
            raise PtxError(f"unknown opcode {op}")
        address_text, registers = (operands[1], operands[0]) if root == "ld" else (operands[0], operands[1])
        names = registers.strip("{}").replace(" ", "").split(",")
        lanes = np.flatnonzero(active)
        base, _, shift = address_text.strip("[]").partition("+")
        addresses = (self.value(base, np.uint64).astype(np.int64) + (int(shift) if shift else 0))[lanes]
        size = np.dtype(kind).itemsize * len(names)
        if (addresses % size).any():
            misaligned = addresses[addresses % size != 0][0]
            raise PtxError(f"an access of {size} bytes at {misaligned:#x}, which it does not divide")
        if space == "global":
            self.check_waited(active)
        buffer = self.buffer_at(space, int(addresses[0]))
        begin = addresses - buffer.base
        if (begin < 0).any() or (begin + size > len(buffer.data)).any():
            raise PtxError(f"an access outside of {buffer.name}: byte {begin.min()} to {begin.max() + size}")
        offsets = begin[:, None] + np.arange(size)
        if space != "param":
            self.check_access(buffer, root, offsets, lanes)
        if space == "global":
            self.count(buffer, root, offsets, lanes)
        if root == "ld":
            self.load(buffer, kind, names, offsets, lanes)
        else:
            self.store(buffer, kind, names, offsets, lanes)

    def buffer_at(self, space: str, address: int) -> Buffer:
        if space in ("param", "shared"):
            return self.launch.parameters if space == "param" else self.shared
        buffer = self.launch.memory.find(address)
        if buffer is None:
            raise PtxError(f"an access at {address:#x}, where nothing is")
        return buffer

    def load(self, buffer: Buffer, kind: type, names: list[str], offsets: np.ndarray, lanes: np.ndarray) -> None:
        data, size = buffer.data[offsets], np.dtype(kind).itemsize
        for i, name in enumerate(names):
            bits = np.ascontiguousarray(data[:, i * size : (i + 1) * size]).view(f"u{size}")[:, 0]
            register = self.register(name)
            if np.dtype(kind).kind == "i":
                bits = bits.view(kind).astype(f"i{register.dtype.itemsize}").view(register.dtype)
            register[lanes] = bits.astype(register.dtype)

    def store(self, buffer: Buffer, kind: type, names: list[str], offsets: np.ndarray, lanes: np.ndarray) -> None:
        size = np.dtype(kind).itemsize
        for i, name in enumerate(names):
            bits = np.ascontiguousarray(self.value(name, f"u{size}" if size > 1 else np.uint8)[lanes])
            buffer.data[offsets[:, i * size : (i + 1) * size]] = bits[:, None].view(np.uint8)

    def check_waited(self, active: np.ndarray) -> None:
        """Checks an access to any global memory: the previous kernel may write axes, floors and slots, too."""
        if not self.waited[active].all():
            raise PtxError("an access to memory before the wait for the kernel that may be writing there")

    def copy(self, op: str, operands: tuple[str, ...], active: np.ndarray) -> None:
        """cp.async. The bytes arrive only when a lane waits for them, so that an earlier access is an error."""
        if op == "cp.async.commit_group":
            self.committed[active] += 1
        elif op == "cp.async.wait_group":
            for copy in self.copies:
                finished = active[copy.lanes] & (copy.group < self.committed[copy.lanes] - int(operands[0]))
                self.finish_copy(copy, finished)
            self.copies = [copy for copy in self.copies if len(copy.lanes)]
        elif op == "cp.async.cg.shared.global" and operands[2] == "16":
            self.start_copy(operands, active)
        else:
            raise PtxError(f"unknown opcode {op}")

    def start_copy(self, operands: tuple[str, ...], active: np.ndarray) -> None:
        lanes = np.flatnonzero(active)
        shared_offset = self.value(operands[0].strip("[]"), np.uint64).astype(np.int64)[lanes]
        address = self.value(operands[1].strip("[]"), np.uint64).astype(np.int64)[lanes]
        length = self.value(operands[3], np.uint32).astype(np.int64)[lanes]
        reads = length > 0
        self.check_waited(active)
        if (shared_offset % 16).any() or (address[reads] % 16).any() or (length > 16).any():
            raise PtxError("a copy that is not 16 bytes at a multiple of 16")
        if (shared_offset + 16 > len(self.shared.data)).any():
            raise PtxError(f"an access outside of shared: byte {shared_offset.max()}")
        offsets = shared_offset[:, None] + np.arange(16)
        self.check_access(self.shared, "st", offsets, lanes)
        self.shared.written[offsets] = False
        self.shared.copying[offsets] += 1
        source = None
        if reads.any():
            source = self.buffer_at("global", int(address[reads][0]))
            address = address - source.base
            if (address[reads] < 0).any() or (address + length > len(source.data))[reads].any():
                raise PtxError(f"an access outside of {source.name}: byte {address[reads].max()}")
            if (length[reads] != 16).any():
                raise PtxError("a copy of part of its bytes, which is not known here")
            offsets = address[reads][:, None] + np.arange(16)
            self.check_access(source, "ld", offsets, lanes[reads])
            source.copying[offsets] += 1
            self.count(source, "ld", offsets, lanes[reads])
        self.copies.append(Copy(lanes, self.committed[lanes].copy(), source, address, shared_offset, length))

    def finish_copy(self, copy: Copy, finished: np.ndarray) -> None:
        """Writes the bytes of the finished lanes of a copy, and drops these lanes from it."""
        offsets = copy.shared_offset[finished][:, None] + np.arange(16)
        reads = finished & (copy.length > 0)
        self.shared.data[offsets] = 0
        if copy.source is not None and reads.any():
            source_offsets = copy.source_offset[reads][:, None] + np.arange(16)
            self.shared.data[copy.shared_offset[reads][:, None] + np.arange(16)] = copy.source.data[source_offsets]
            copy.source.copying[source_offsets] -= 1
        self.shared.written[offsets] = True
        self.shared.copying[offsets] -= 1
        for name in ("lanes", "group", "source_offset", "shared_offset", "length"):
            setattr(copy, name, getattr(copy, name)[~finished])

    def count(self, buffer: Buffer, root: str, offsets: np.ndarray, lanes: np.ndarray) -> None:
        """Counts the sectors that the request of each warp moves, and the bytes that its lanes request."""
        for start in range(0, self.threads, WARP):
            in_warp = (lanes >= start) & (lanes < start + WARP)
            if in_warp.any():
                sectors = np.unique((buffer.base + offsets[in_warp]) // SECTOR)
                buffer.sectors[root] += len(sectors)
                buffer.touched[root].update(sectors.tolist())
                buffer.requested[root] += int(in_warp.sum()) * offsets.shape[1]

    def check_access(self, buffer: Buffer, root: str, offsets: np.ndarray, lanes: np.ndarray) -> None:
        """Raises for a race, for an access to bytes that are being copied, and for a read of unwritten bytes."""
        now = (self.number << 32) | self.epoch
        thread = (self.number * self.threads + lanes + 1)[:, None]

        def is_unordered(other: np.ndarray, time: np.ndarray) -> np.ndarray:
            """Whether no barrier is between this access and the last one, by another thread."""
            is_ordered = (time >> 32 == self.number) & (time < now)
            return (other != 0) & (other != thread) & ~is_ordered

        if buffer.copying[offsets].any() and (root == "st" or buffer is self.shared):
            raise PtxError(f"{buffer.name} is used while it is being copied")
        if is_unordered(buffer.writer[offsets], buffer.write_time[offsets]).any():
            raise PtxError(f"a race: {buffer.name} was written by another thread, with no barrier since")
        if root == "ld":
            if not buffer.written[offsets].all():
                raise PtxError(f"a read of {buffer.name} where nothing was written")
            has_other_reader = is_unordered(buffer.reader[offsets], buffer.read_time[offsets])
            buffer.reader[offsets] = np.where(has_other_reader, -1, thread)
            bytes_read, count = np.unique(offsets, return_counts=True)
            buffer.reader[bytes_read[count > 1]] = -1
            buffer.read_time[offsets] = now
            return
        if is_unordered(buffer.reader[offsets], buffer.read_time[offsets]).any():
            raise PtxError(f"a race: {buffer.name} was read by another thread, with no barrier since")
        if len(np.unique(offsets)) != offsets.size:
            raise PtxError(f"a race: two threads write the same byte of {buffer.name}")
        buffer.written[offsets] = True
        buffer.writer[offsets] = thread
        buffer.write_time[offsets] = now

    # Scheduling.

    def run(self, random: np.random.Generator | None) -> None:
        """Runs to the end: lanes by lowest program counter, or, with a generator, warp by warp in a random order."""
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
        """Wakes lanes that wait at a shuffle when all lanes of their warp have reached it."""
        if self.stuck.any():
            for start in range(0, self.threads, WARP):
                if len(np.unique(self.pc[start : start + WARP])) == 1:
                    self.stuck[start : start + WARP] = False


class Launch:
    """A kernel with its parameters and memory.

    dynamic
        bytes of dynamic shared memory.
    early
        whether the kernel starts before the previous kernel has ended (programmatic dependent launch).
    """

    def __init__(
        self,
        kernel: Kernel,
        memory: Memory,
        parameters: bytes,
        grid: tuple[int, int],
        block: int,
        dynamic: int = 0,
        early: bool = False,
    ) -> None:
        self.kernel, self.memory, self.grid, self.block, self.dynamic = kernel, memory, grid, block, dynamic
        self.early = early
        ((name, size),) = kernel.parameters
        if len(parameters) != size:
            raise ValueError(f"the kernel takes {size} bytes of parameters, got {len(parameters)}")
        self.parameters = Buffer.of("parameters", 0, np.frombuffer(bytearray(parameters), np.uint8), True)
        self.parameter_offsets = {name: 0}
        self.counts: Counter[str] = Counter()

    def run(self, seed: int | None = None) -> None:
        """Runs blocks in order and lanes together, or, with a seed, blocks and warps in a random order."""
        random = None if seed is None else np.random.default_rng(seed)
        blocks = [(x, y) for y in range(self.grid[1]) for x in range(self.grid[0])]
        if random is not None:
            random.shuffle(blocks)
        for index in blocks:
            Block(self, tuple(int(i) for i in index)).run(random)
