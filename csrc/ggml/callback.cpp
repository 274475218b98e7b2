#include "ggml/callback.h"

#include <cstdlib>
#include <cstring>
#include <utility>

#include "launchers/cpu.h"

namespace axiscap::ggml {
namespace {

// llama.cpp names the output of block N "l_out-N".
constexpr char kOutputPrefix[] = "l_out-";

}  // namespace

Callback::Callback(Library library, std::vector<Layer> layers, int64_t num_slots, int64_t directions,
                   int64_t hidden_size)
    : library_(library),
      layers_(std::move(layers)),
      num_slots_(num_slots),
      directions_(directions),
      hidden_size_(hidden_size),
      row_counts_(layers_.size()) {}

void Callback::announce(std::vector<int32_t> slots, std::vector<uint8_t> outputs) {
  slots_ = std::move(slots), outputs_ = std::move(outputs);
  is_announced_ = true;
  part_begin_ = part_rows_ = 0;
  row_counts_.assign(layers_.size(), 0);
  problem_ = nullptr;
}

const char* Callback::end() {
  is_announced_ = false;
  part_begin_ = part_rows_ = 0;
  const int64_t rows = slots_.size();
  int64_t outputs = 0;
  for (const uint8_t output : outputs_) outputs += output != 0;
  for (size_t layer = 0; layer < layers_.size() && !problem_; ++layer) {
    // In the last block llama.cpp computes only the rows that have an output.
    const bool is_complete =
        row_counts_[layer] == rows || (layer + 1 == layers_.size() && row_counts_[layer] == outputs);
    if (layers_[layer].axes && !is_complete) problem_ = "a capped layer did not see each row of the batch once";
  }
  return problem_;
}

bool Callback::call(void* tensor, bool ask, void* self) { return static_cast<Callback*>(self)->on_tensor(tensor, ask); }

// With `ask` the scheduler asks whether it shall call again with the tensor's data. Returns true then for capped
// layers; without `ask`, true lets the computation go on.
bool Callback::on_tensor(void* tensor, bool ask) {
  const char* name = library_.get_name(tensor);
  constexpr size_t kLength = sizeof(kOutputPrefix) - 1;
  if (std::strncmp(name, kOutputPrefix, kLength) != 0) return !ask;
  char* end = nullptr;
  const unsigned long layer = std::strtoul(name + kLength, &end, 10);
  if (end == name + kLength || *end != '\0' || layer >= layers_.size()) return !ask;
  if (!ask) {
    cap_layer(tensor, layer);
    return true;
  }
  if (layer == 0) {  // the next part of the batch begins
    part_begin_ += part_rows_;
    part_rows_ = library_.nrows(tensor);
  }
  return layers_[layer].axes != nullptr;
}

void Callback::cap_layer(void* tensor, size_t layer) {
  const Layer& bank = layers_[layer];
  const int64_t rows = library_.nrows(tensor);
  const size_t bytes = library_.nbytes(tensor);
  if (library_.nelements(tensor) != rows * hidden_size_ || bytes != size_t(rows * hidden_size_) * sizeof(float)) {
    problem_ = "a layer's output is not (rows, hidden size) in float32";
    return;
  }
  if (const char* problem = find_row_slots(layer, rows)) {
    problem_ = problem;
    return;
  }
  rows_.resize(rows * hidden_size_);
  projections_.resize(rows * directions_);
  library_.tensor_get(tensor, rows_.data(), 0, bytes);
  cap_rows(bank, rows);
  if (is_any_row_below(bank, rows)) library_.tensor_set(tensor, rows_.data(), 0, bytes);
  count_rows(bank, rows);
}

const char* Callback::find_row_slots(size_t layer, int64_t rows) {
  row_slots_.assign(rows, default_slot_);
  if (!is_announced_) return nullptr;
  const int64_t part_end = part_begin_ + part_rows_;
  if (part_end > int64_t(slots_.size())) return "the batch has more rows than were announced";
  int64_t row = 0;
  for (int64_t i = part_begin_; i < part_end; ++i)
    if (rows == part_rows_ || outputs_[i]) {
      if (row < rows) row_slots_[row] = slots_[i];
      ++row;
    }
  if (row != rows) return "a layer's output has neither all rows nor those that have an output";
  row_counts_[layer] += rows;
  return nullptr;
}

void Callback::cap_rows(const Layer& bank, int64_t rows) {
  CapParams params;
  params.hidden = params.out = rows_.data();
  params.hidden_stride = params.out_stride = params.hidden_size = hidden_size_;
  params.rows = rows;
  params.axes = bank.axes, params.lifts = bank.lifts, params.floors = bank.floors, params.targets = bank.targets;
  params.norm_limits = bank.norm_limits;
  params.slots = row_slots_.data();
  params.num_slots = num_slots_, params.directions = directions_;
  params.projections = projections_.data();
  cpu::cap(params, 0, rows);
}

// A row fires only if a projection of the incoming row is below its floor: the first direction that fires has seen the
// incoming row.
bool Callback::is_any_row_below(const Layer& bank, int64_t rows) const {
  bool below = false;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t k = 0; row_slots_[row] != kNoSlot && k < directions_; ++k)
      below |= projections_[row * directions_ + k] < bank.floors[row_slots_[row] * directions_ + k];
  return below;
}

void Callback::count_rows(const Layer& bank, int64_t rows) const {
  StatsParams stats;
  stats.projections = projections_.data(), stats.floors = bank.floors, stats.slots = row_slots_.data();
  stats.stats = bank.stats;
  stats.rows = rows, stats.num_slots = num_slots_, stats.directions = directions_;
  cpu::accumulate(stats);
}

}  // namespace axiscap::ggml
