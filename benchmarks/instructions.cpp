// Runs one kernel once over rows in memory, so that callgrind can count its instructions. Unlike times, instruction
// counts do not depend on how busy the machine is.
//   instructions cap|read|read_modify_write H ROWS none|all
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "launchers/cpu.h"

int main(int argc, char** argv) {
  if (argc != 5) {
    std::printf("usage: %s cap|read|read_modify_write H ROWS none|all\n", argv[0]);
    return 2;
  }
  const std::string kernel = argv[1];
  const int64_t size = std::atoll(argv[2]), rows = std::atoll(argv[3]);
  std::vector<uint16_t> hidden(size * rows, 0x3f80);  // ones
  std::vector<float> axis(size, 0.f);
  axis[0] = 1;
  const float floor = std::string(argv[4]) == "all" ? 2.f : 0.f;
  axiscap::CapParams p;
  p.dtype = axiscap::DType::kBFloat16;
  p.hidden = p.out = hidden.data();
  p.hidden_stride = p.out_stride = p.hidden_size = size;
  p.rows = rows;
  p.axes = axis.data();
  p.floors = &floor;
  p.num_slots = p.directions = 1;
  if (kernel == "cap") axiscap::cpu::cap(p, 0, rows);
  if (kernel == "read") axiscap::cpu::read_pass(hidden.data(), hidden.size() * 2);
  if (kernel == "read_modify_write") axiscap::cpu::read_modify_write_pass(hidden.data(), hidden.size() * 2);
  std::printf("%s, %s\n", axiscap::cpu::isa(), hidden[0] == 0x3f80 ? "unchanged" : "changed");
}
