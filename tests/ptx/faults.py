"""Faults that the tests plant in a kernel's PTX: each changes the list of instructions."""

from __future__ import annotations

import dataclasses

import torch
from emulated import kernel_name, kernels
from ptx_module import Instruction, Kernel


def plant(name: str, change) -> dict[str, Kernel]:
    """The module with one kernel's instructions changed by change(code) -> code of the same length."""
    kernel = kernels()[name]
    code = change(list(kernel.code))
    assert len(code) == len(kernel.code)
    assert code != kernel.code, "the fault was not planted"
    return {**kernels(), name: dataclasses.replace(kernel, code=code)}


#: The kernel that most faults are planted in.
PLANTED_KERNEL = kernel_name(torch.bfloat16, "cap", False, True)


def nop(instruction: Instruction) -> Instruction:
    return dataclasses.replace(instruction, op="griddepcontrol.launch_dependents", operands=(), guard=None)


def find_first(code: list[Instruction], op: str, start: int = 0) -> int:
    return next(i for i in range(start, len(code)) if code[i].op.startswith(op))


def find_squarings(code: list[Instruction]) -> list[int]:
    """The instructions of the sum of squares of the incoming row."""
    before_vote = range(find_first(code, "vote"))
    return [i for i in before_vote if code[i].op == "fma.rn.f32" and len(set(code[i].operands[1:3])) == 1]


def find_squared_limit(code: list[Instruction]) -> int:
    """The multiplication of the norm limit with itself."""
    return next(i for i in range(len(code)) if code[i].op == "mul.f32" and len(set(code[i].operands[1:])) == 1)


def find_load(code: list[Instruction], register: str) -> int:
    """The load of a bank's entry into the register, which has the default value before."""
    return next(i for i in range(len(code)) if code[i].op == "ld.global.nc.f32" and code[i].operands[0] == register)


def find_last_shuffle(code: list[Instruction]) -> int:
    """The last shuffle of the projection's sum. Later shuffles sum squares and rows that may be out of range."""
    return max(i for i in range(find_squarings(code)[0]) if code[i].op.startswith("shfl"))


def drop_a_lane(code):
    """The projection leaves out the value of the last shuffle."""
    index = find_first(code, "add.f32", find_last_shuffle(code))
    code[index] = dataclasses.replace(code[index], op="mov.f32", operands=code[index].operands[:2])
    return code


def drop_the_barrier(code):
    return [nop(i) if i.op.startswith("bar.") else i for i in code]


def read_one_too_far(code):
    """The bounds of a tail are off by one: offset + e <= size for offset + e < size."""
    for load in [i for i, instruction in enumerate(code) if instruction.op == "ld.global.u16"]:
        test = max(i for i in range(load) if code[i].op.startswith("setp"))
        if code[test].op == "setp.ge.s32":
            code[test] = dataclasses.replace(code[test], op="setp.gt.s32")
    return code


def forget_the_slot(code):
    """Every slot gets the axis of slot 0: slot * H becomes 0."""
    index = find_first(code, "ld.global.nc")
    product = max(i for i in range(index) if code[i].op == "mul.lo.s64")
    code[product] = dataclasses.replace(code[product], op="mov.u64", operands=(code[product].operands[0], "0"))
    return code


def store_every_row(code):
    """The branch around the stores of a row is never taken."""
    index = find_first(code, "st.global.v4")
    targets = kernels()[PLANTED_KERNEL].labels
    around = [i for i in range(index) if code[i].op == "bra" and code[i].guard and targets[code[i].operands[0]] > index]
    for i in around[-2:]:
        code[i] = nop(code[i])
    return code


def shuffle_apart(code):
    """Half of a warp does not come to the shuffle."""
    unneeded = find_first(code, "griddepcontrol.launch_dependents")
    code[unneeded] = dataclasses.replace(code[unneeded], op="setp.lt.u32", operands=("%p9999", "%tid.x", "16"))
    index = find_last_shuffle(code)
    code[index] = dataclasses.replace(code[index], guard="%p9999")
    return code


def misalign_a_copy(code):
    """A vector is copied from two bytes behind its address."""
    index = find_first(code, "cp.async.cg")
    address = code[index].operands[1].strip("[]")
    add = max(i for i in range(index) if code[i].op == "add.s64" and code[i].operands[0] == address)
    code[add] = dataclasses.replace(code[add], operands=(address, code[add].operands[1], "2"))
    return code


def do_not_wait(code):
    """A row is used while it is copied."""
    return [nop(i) if i.op == "cp.async.wait_group" else i for i in code]


def wait_for_too_few(code):
    """The wait leaves one more group of copies unfinished."""
    index = find_first(code, "cp.async.wait_group")
    code[index] = dataclasses.replace(code[index], operands=("2",))
    return code


def do_not_wait_for_the_kernel_before(code):
    return [nop(i) if i.op == "griddepcontrol.wait" else i for i in code]


def wait_behind_the_first_loads(code):
    """The wait comes after the first slot has been read."""
    loads = find_first(code, "ld.global")
    code[find_first(code, "griddepcontrol.wait")] = nop(code[loads])
    code[find_first(code, "setp", loads)] = dataclasses.replace(
        code[find_first(code, "setp", loads)], op="griddepcontrol.wait", operands=()
    )
    return code


def offset_of_32_bits(code):
    """row * stride is a product of 32-bit numbers."""
    return [dataclasses.replace(i, op="mul.wide.s32") if i.op == "mul.lo.s64" else i for i in code]


def fire_at_the_floor(code):
    """projection <= floor for projection < floor."""
    inverse = {"setp.geu.f32": "setp.gtu.f32", "setp.leu.f32": "setp.ltu.f32"}
    return [
        dataclasses.replace(i, op=inverse[i.op])
        if i.op in inverse and (i.operands[2].startswith("%") or i.operands[2] == "0f00000000")
        else i
        for i in code
    ]


def accept_one_slot_too_many(code):
    """The first row of a block may have slot num_slots."""
    index = find_first(code, "setp.gt.u64")
    code[index] = dataclasses.replace(code[index], op="setp.ge.u64")
    return code


def never_check_the_range(code):
    """No correction counts as large, not even an infinite one."""
    return [
        dataclasses.replace(i, operands=(*i.operands[:2], "0f7F800000")) if i.operands[2:] == ("0f4E800000",) else i
        for i in code
    ]


def ignore_the_target(code):
    """Rows are corrected to their floors."""
    correction = find_first(code, "sub.f32")
    index = find_load(code, code[correction].operands[1])
    code[index] = nop(code[index])
    return code


def ignore_the_limit(code):
    """Every limit is infinite."""
    index = find_load(code, code[find_squared_limit(code)].operands[1])
    code[index] = nop(code[index])
    return code


def take_the_limit_of_the_first_slot(code):
    index = find_load(code, code[find_squared_limit(code)].operands[1])
    address = code[index].operands[1].strip("[]")
    add = max(i for i in range(index) if code[i].op == "add.s64" and code[i].operands[0] == address)
    code[add] = dataclasses.replace(code[add], operands=(address, code[add].operands[1], "0"))
    return code


def leave_an_element_out_of_the_norm(code):
    """The last element of each vector."""
    index = find_squarings(code)[-1]
    result, _, _, total = code[index].operands
    code[index] = dataclasses.replace(code[index], op="mov.f32", operands=(result, total))
    return code


def leave_a_lane_out_of_the_norm(code):
    """The sum of squares leaves out the value of the last shuffle."""
    limit = find_squared_limit(code)
    index = find_first(code, "add.f32", max(i for i in range(limit) if code[i].op.startswith("shfl")))
    code[index] = dataclasses.replace(code[index], op="mov.f32", operands=code[index].operands[:2])
    return code


def leave_a_row_at_its_limit_alone(code):
    """squares >= limit * limit for >."""
    index = find_first(code, "setp.leu.f32", find_squared_limit(code))
    code[index] = dataclasses.replace(code[index], op="setp.ltu.f32")
    return code


def swap_fp8_bytes(code):
    """Two numbers that are rounded to two bytes are swapped."""
    return [
        dataclasses.replace(i, operands=(i.operands[0], i.operands[2], i.operands[1])) if "e4m3x2" in i.op else i
        for i in code
    ]


def drop_a_lane_of_the_maximum(code):
    """The largest element of a row leaves out the value of the last shuffle."""
    index = find_first(code, "max", max(i for i in range(len(code)) if code[i].op.startswith("shfl")))
    code[index] = dataclasses.replace(code[index], op="mov.f32", operands=code[index].operands[:2])
    return code


def drop_the_smallest_scale(code):
    """A row's scale may be 0."""
    index = max(i for i in range(len(code)) if code[i].op == "max.f32")
    code[index] = dataclasses.replace(code[index], op="mov.f32", operands=code[index].operands[:2])
    return code
