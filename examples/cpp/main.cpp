// Caps two rows on a CPU, and shows what a GPU would be asked. Built against an installed AxisCap:
//   cmake -S . -B build -DAXISCAP_PYTHON=OFF && cmake --build build && cmake --install build --prefix PREFIX
//   cmake -S examples/cpp -B build/example -DCMAKE_PREFIX_PATH=PREFIX && cmake --build build/example
#include <axiscap/axiscap.h>

#include <cstdio>

int main() {
  float rows[2][4] = {{-3, 1, 0, 0}, {2, 1, 0, 0}};
  const float axis[4] = {1, 0, 0, 0};
  const float floor = -1;
  float projections[2];

  axiscap_call call = {};
  call.size = sizeof(call);
  call.hidden = rows;
  call.hidden_stride = call.hidden_size = 4;
  call.rows = 2;
  call.dtype = AXISCAP_FLOAT32;
  call.axes = axis;
  call.floors = &floor;
  call.num_slots = call.directions = 1;
  call.projections = projections;
  if (axiscap_cap_cpu(&call, 0, call.rows) != AXISCAP_OK) {
    std::printf("error: %s\n", axiscap_last_error());
    return 1;
  }
  for (int row = 0; row < 2; ++row)
    std::printf("projection %g, row now %g %g %g %g\n", projections[row], rows[row][0], rows[row][1], rows[row][2],
                rows[row][3]);

  const axiscap_status status = axiscap_cap_cuda(&call, nullptr);  // on a GPU the pointers would be the device's
  std::printf("CUDA: status %d, %s\n", status, status == AXISCAP_OK ? "started" : axiscap_last_error());

  call.hidden_size = 0;
  std::printf("wrong: status %d, %s\n", axiscap_cap_cpu(&call, 0, 2), axiscap_last_error());
}
