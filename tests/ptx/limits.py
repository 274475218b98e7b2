"""What the compiled kernels may use, and why."""

# Every architecture that a release is built for.
ARCHITECTURES = (80, 86, 89, 90, 100, 103, 110, 120)

# 512 threads a block at 65,536 registers a processor.
REGISTERS = 128
# A spilled register costs memory traffic that the op's own bytes do not have.
SPILL_BYTES = 0
# Arrays in local memory are spills by another name.
STACK_BYTES = 0
# One block's partial sums, twice; the statistics: eight doubles a warp.
SHARED_BYTES = 2048

# Of three dtypes: three ops, each for rows in registers (of one direction, or of any number) and for rows in shared
# memory; and the cap of several layers, for both.
CAP_KERNELS = 3 * (3 * (2 + 1) + 2)
# Each kernel is compiled for every architecture of a release.
MOST_CAP_KERNELS = 39
# The statistics, by warps and by blocks.
KERNELS = CAP_KERNELS + 2

# The gate of cuxray, which reads the machine code and not what the compiler says of it.
GATE = f"spill_instrs=={SPILL_BYTES}, regs<={REGISTERS}, stack=={STACK_BYTES}, smem<={SHARED_BYTES}"
