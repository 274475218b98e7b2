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

# Of three dtypes: four ops, of one direction or more, aligned or not, and that of one stream for several layers as
# well; four for wide rows; and the statistics, by warps and by blocks.
KERNELS = 3 * (4 * 2 * 2 + 2 * 2 + 4) + 2

# The gate of cuxray, which reads the machine code and not what the compiler says of it.
GATE = f"spill_instrs=={SPILL_BYTES}, regs<={REGISTERS}, stack=={STACK_BYTES}, smem<={SHARED_BYTES}"
