// The cap in llama.cpp: an evaluation callback of ggml's scheduler, which gets the output of each block and may change
// it. ggml is neither included nor linked: the caller passes the addresses of its functions.
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

// The callback of one llama.cpp context: the banks of its layers, and the slots of the rows of the next decode. Like
// the context it may be used by one thread at a time.
class Callback {
 public:
  // The caller owns the bank and the statistics, and keeps them longer than the callback.
  struct Layer {
    const float* axes = nullptr;  // null: the layer is not capped
    const float* lifts = nullptr;
    const float* floors = nullptr;
    const float* targets = nullptr;
    const float* norm_limits = nullptr;
    double* stats = nullptr;
  };

  Callback(Library library, std::vector<Layer> layers, int64_t num_slots, int64_t directions, int64_t hidden_size);

  // Announces the next decode: the slot of each row of its batch, and whether the row has an output. The rows of a
  // decode that is not announced have the default slot.
  void announce(std::vector<int32_t> slots, std::vector<uint8_t> outputs);
  void set_default_slot(int32_t slot) { default_slot_ = slot; }
  bool is_valid_slot(int32_t slot) const { return slot >= kNoSlot && slot < num_slots_; }

  // Ends the announced decode. Returns null if every capped layer saw every row once, else an error text.
  const char* end();

  // ggml_backend_sched_eval_callback, with a Callback as user data.
  static bool call(void* tensor, bool ask, void* self);

 private:
  bool on_tensor(void* tensor, bool ask);
  void cap_layer(void* tensor, size_t layer);
  // Sets row_slots_ to the slots of the `rows` rows of a layer's output. Returns null or an error text.
  const char* find_row_slots(size_t layer, int64_t rows);
  // Caps rows_ and computes projections_.
  void cap_rows(const Layer& bank, int64_t rows);
  bool is_any_row_below(const Layer& bank, int64_t rows) const;
  void count_rows(const Layer& bank, int64_t rows) const;

  Library library_;
  std::vector<Layer> layers_;
  int64_t num_slots_, directions_, hidden_size_;

  std::vector<int32_t> slots_;
  std::vector<uint8_t> outputs_;
  int32_t default_slot_ = 0;
  bool is_announced_ = false;
  // llama.cpp computes a batch in parts: the first row of the current part, and its number of rows.
  int64_t part_begin_ = 0, part_rows_ = 0;
  std::vector<int64_t> row_counts_;  // rows that each layer has seen since the announcement
  const char* problem_ = nullptr;

  std::vector<float> rows_, projections_;  // copies of a layer's output (rows, hidden_size), and (rows, directions)
  std::vector<int32_t> row_slots_;
};

}  // namespace axiscap::ggml
