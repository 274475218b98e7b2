"""The limits of the compiled kernels, and their reasons."""

# The architectures of a release (CMakeLists.txt).
ARCHITECTURES = (80, 86, 89, 90, 100, 103, 110, 120)

# 65,536 registers of a processor for the 512 threads of a block.
REGISTERS = 128
# A spilled register adds memory traffic.
SPILL_BYTES = 0
# Local arrays are in memory, like spilled registers.
STACK_BYTES = 0
# Static shared memory. The statistics need most: eight doubles for each of 32 warps.
SHARED_BYTES = 2048

# For each of three dtypes: three ops with two kernels for rows in registers (one direction, any number) and one for
# rows in shared memory; and the cap of several layers for both kinds of rows.
CAP_KERNELS = 3 * (3 * (2 + 1) + 2)
# A wheel has each kernel for every architecture: more kernels make it larger and its build longer.
MAX_CAP_KERNELS = 39
# Two kernels count the statistics: a slot by a warp or by a block.
KERNELS = CAP_KERNELS + 2

# The gate of cuxray, which reads the machine code and not the compiler's messages.
GATE = f"spill_instrs=={SPILL_BYTES}, regs<={REGISTERS}, stack=={STACK_BYTES}, smem<={SHARED_BYTES}"
