// The C interface: it checks a call and runs the kernels of the torch extension.
#include "axiscap/axiscap.h"

#include <string>

#include "launchers/accelerator.h"
#include "launchers/cpu.h"

namespace {

using namespace axiscap;

thread_local std::string last_error;

axiscap_status fail(axiscap_status status, const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) {  // no memory for the text: the caller has the status alone
  }
  return status;
}

// Returns the error text of an invalid call, or null.
const char* find_problem(const axiscap_call* call) {
  if (!call) return "call is NULL";
  if (call->size != int64_t(sizeof(axiscap_call))) return "size must be sizeof(axiscap_call)";
  if (call->dtype < AXISCAP_FLOAT32 || call->dtype > AXISCAP_FLOAT16) return "dtype is not an axiscap_dtype";
  if (call->rows < 0) return "rows must not be negative";
  if (call->hidden_size < 1) return "hidden_size must be at least 1";
  if (call->num_slots < 1) return "num_slots must be at least 1";
  if (call->directions < 1 || call->directions > kMaxDirections) return "directions must be from 1 to 64";
  if (call->rows > 0 && !call->hidden) return "hidden is NULL";
  if (!call->axes) return "axes is NULL";
  if (!call->floors && !call->project_only) return "floors is NULL";
  if (call->rows > 1 && call->hidden_stride < call->hidden_size) return "hidden_stride must be at least hidden_size";
  if (call->residual && call->rows > 1 && call->residual_stride < call->hidden_size)
    return "residual_stride must be at least hidden_size";
  if (call->out && call->rows > 1 && call->out_stride < call->hidden_size)
    return "out_stride must be at least hidden_size";
  if (call->out && call->residual) return "out and residual exclude each other";
  if (call->weight && (!call->residual || call->project_only)) return "weight needs residual, and a cap";
  if (call->project_only && (!call->projections || call->out)) return "project_only needs projections, and no out";
  if (call->weight && !(call->eps >= 0)) return "eps must not be negative";
  if (call->quantized && !call->weight) return "quantized needs weight";
  if (call->quantized && !call->scale == !call->scales) return "quantized needs one of scale and scales";
  if (call->quantized && call->rows > 1 && call->quantized_stride < call->hidden_size)
    return "quantized_stride must be at least hidden_size";
  return nullptr;
}

CapParams make_params(const axiscap_call& call) {
  CapParams p;
  p.dtype = static_cast<DType>(call.dtype);
  p.hidden = call.hidden;
  p.hidden_stride = call.hidden_stride;
  p.residual = call.residual;
  p.residual_stride = call.residual_stride;
  p.rows = call.rows;
  p.hidden_size = call.hidden_size;
  if (!call.project_only) {
    p.out = call.out ? call.out : call.residual ? call.residual : call.hidden;
    p.out_stride = call.out ? call.out_stride : call.residual ? call.residual_stride : call.hidden_stride;
    p.floors = call.floors;
    p.targets = call.targets;
    p.lifts = call.lifts;
    p.norm_limits = call.norm_limits;
  }
  p.axes = call.axes;
  p.slots = call.slots;
  p.num_slots = call.num_slots;
  p.directions = call.directions;
  p.projections = call.projections;
  if (call.weight) {
    p.weight = call.weight;
    p.normed = call.hidden;
    p.normed_stride = call.hidden_stride;
    p.eps = call.eps;
    p.weight_bias = call.weight_bias;
    if (call.quantized) {
      p.normed = call.quantized;
      p.normed_stride = call.quantized_stride;
      p.scale = call.scale;
      p.scales = call.scales;
    }
  }
  return p;
}

}  // namespace

int axiscap_version(void) { return AXISCAP_VERSION; }

axiscap_status axiscap_cap_cpu(const axiscap_call* call, int64_t begin, int64_t end) {
  if (const char* message = find_problem(call)) return fail(AXISCAP_INVALID_ARGUMENT, message);
  if (begin < 0 || end < begin || end > call->rows)
    return fail(AXISCAP_INVALID_ARGUMENT, "begin and end must be a range of rows");
  for (int64_t row = begin; call->slots && row < end; ++row)
    if (call->slots[row] < kNoSlot || call->slots[row] >= call->num_slots)
      return fail(AXISCAP_SLOT_OUT_OF_RANGE, "a slot is neither -1 nor in [0, num_slots)");
  cpu::cap(make_params(*call), begin, end);
  return AXISCAP_OK;
}

axiscap_status axiscap_cap_cuda(const axiscap_call* call, void* stream) {
  if (const char* message = find_problem(call)) return fail(AXISCAP_INVALID_ARGUMENT, message);
  if (!accelerator) return fail(AXISCAP_UNAVAILABLE, "this library was built without CUDA");
  if (call->rows == 0) return AXISCAP_OK;
  const CapParams params = make_params(*call);
  if (const char* message = accelerator->cap(&params, 1, -1, stream)) return fail(AXISCAP_CUDA_ERROR, message);
  return AXISCAP_OK;
}

const char* axiscap_last_error(void) { return last_error.c_str(); }
