// Capping where ggml runs the model (llama.cpp): an evaluation callback of its scheduler, which sees each block's
// output and may change it. Nothing of ggml is included or linked: whoever has loaded the library gives its functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/params.h"

namespace axiscap::ggml {

struct Library {
  const char* (*get_name)(const void* tensor);
  int64_t (*nelements)(const void* tensor);
  int64_t (*nrows)(const void* tensor);
  size_t (*nbytes)(const void* tensor);
  void (*tensor_get)(const void* tensor, void* data, size_t offset, size_t size);
  void (*tensor_set)(void* tensor, const void* data, size_t offset, size_t size);
};

// One context's: the banks of the capped layers, and whose rows the next decode has. Used by one thread at a time, as a
// context of llama.cpp's is.
class Callback {
 public:
  // Bank and statistics are the caller's, and outlive this.
  struct Layer {
    const float* axes = nullptr;  // null: not capped
    const float* lifts = nullptr;
    const float* floors = nullptr;
    const float* targets = nullptr;
    const float* norm_limits = nullptr;
    double* stats = nullptr;
  };

  Callback(Library library, std::vector<Layer> layers, int64_t num_slots, int64_t directions, int64_t hidden_size);

  // The rows of the coming decode, in the order of its batch: each one's slot, and which of them have an output. Those
  // of a decode that nobody announced have the other slot.
  void announce(std::vector<int32_t> slots, std::vector<uint8_t> outputs);
  void set_other(int32_t slot) { other_ = slot; }
  bool has(int32_t slot) const { return slot >= kNoSlot && slot < num_slots_; }

  // What has been seen since the last announcement, which is over: null if every capped layer saw every row once.
  const char* end();

  // ggml_backend_sched_eval_callback, with a Callback as user data.
  static bool call(void* tensor, bool ask, void* self);

 private:
  bool see(void* tensor, bool ask);
  void cap(void* tensor, size_t layer);

  Library library_;
  std::vector<Layer> layers_;
  int64_t num_slots_, directions_, hidden_size_;

  std::vector<int32_t> slots_;
  std::vector<uint8_t> outputs_;
  int32_t other_ = 0;
  bool announced_ = false;
  // Where the part of the batch begins that is computed at once, and how many rows it has.
  int64_t at_ = 0, count_ = 0;
  std::vector<int64_t> seen_;  // rows, by layer
  const char* problem_ = nullptr;

  std::vector<float> rows_, projections_;
  std::vector<int32_t> row_slots_;
};

}  // namespace axiscap::ggml
