/* AxisCap for programs without Python or torch: activation capping on raw pointers, on a CPU or a CUDA GPU.
 *
 * For a row x and its slot's directions k, in order, in float32: p = <x, v_k>; if p < tau_k: x += (tau_k - p) * v_k
 * (arXiv 2601.10387, eq. 1); with targets t and lifts u, x += (t_k - p) * u_k. A row that does not fire is not written.
 * A row is left alone, and its projections are NaN, if it is not finite, if its norm is above its limit, or if the
 * corrected row would not be finite in its dtype. Every function checks sizes and pointers before it writes anything,
 * and no function throws a C++ exception.
 */
#ifndef AXISCAP_H
#define AXISCAP_H

#include <stdint.h>

#if defined(_WIN32)
#if defined(AXISCAP_BUILDS_LIBRARY)
#define AXISCAP_API __declspec(dllexport)
#else
#define AXISCAP_API __declspec(dllimport)
#endif
#elif defined(__GNUC__)
#define AXISCAP_API __attribute__((visibility("default")))
#else
#define AXISCAP_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define AXISCAP_VERSION 100 /* 10000 major + 100 minor + patch */

typedef enum axiscap_status {
  AXISCAP_OK = 0,
  AXISCAP_INVALID_ARGUMENT = 1,  /* a null pointer, a size out of range, overlapping rows */
  AXISCAP_SLOT_OUT_OF_RANGE = 2, /* CPU only; a GPU leaves such a row alone and reports NaN */
  AXISCAP_UNAVAILABLE = 3,       /* this library was built without CUDA */
  AXISCAP_CUDA_ERROR = 4
} axiscap_status;

typedef enum axiscap_dtype { AXISCAP_FLOAT32 = 0, AXISCAP_BFLOAT16 = 1, AXISCAP_FLOAT16 = 2 } axiscap_dtype;

/* The arguments of a call. Set all bytes to zero, then set size to sizeof(axiscap_call) and the fields that you need.
 * Strides are in elements. */
typedef struct axiscap_call {
  int64_t size;

  void* hidden;          /* (rows, hidden_size); changed in place, unless residual or out is given */
  int64_t hidden_stride; /* at least hidden_size */
  void* residual;        /* NULL, or the rows are hidden + residual and the correction goes into residual */
  int64_t residual_stride;
  void* out; /* NULL, or the buffer for the capped copy of hidden */
  int64_t out_stride;
  int64_t rows;
  int64_t hidden_size;
  int32_t dtype;        /* axiscap_dtype of hidden, residual, out and weight */
  int32_t project_only; /* not 0: projections are reported and nothing is capped; floors may be NULL */

  const float* axes;    /* (num_slots, directions, hidden_size), contiguous, unit rows */
  const float* lifts;   /* NULL: the axes; or like axes: a row is projected on its axis and corrected along its lift.
                           <axis, lift> must be 1 (or a strength between 0 and 1), and the elements below 2^60 */
  const float* floors;  /* (num_slots, directions): a row below fires; -INFINITY switches a direction off */
  const float* targets; /* NULL: the floors; or like floors, at least the floors: the projection of a corrected row */
  const float* norm_limits; /* NULL, or (num_slots,), positive: a row with a larger norm is left alone */
  const int32_t* slots;     /* (rows,): the slot of each row, -1: the row is left alone; NULL: slot 0 for all rows */
  int64_t num_slots;
  int64_t directions; /* at most 64 */

  float* projections; /* NULL, or (rows, directions): <x, v_k> before the cap, NaN for a row left alone */

  const void*
      weight; /* NULL, or (hidden_size,): residual <- cap(hidden + residual), and hidden becomes its RMS norm, */
  float eps;  /* hidden <- residual / sqrt(mean(residual^2) + eps) * (weight + weight_bias) */
  float weight_bias;

  void*
      quantized; /* NULL, or (rows, hidden_size): the norm divided by a scale, in fp8 (E4M3); hidden stays unchanged */
  int64_t quantized_stride;
  const float* scale; /* one scale for all rows, or */
  float* scales;      /* (rows,), written: max(largest |element| of the row / 448, 1 / (448 * 512)) */
} axiscap_call;

/* The library's AXISCAP_VERSION. */
AXISCAP_API int axiscap_version(void);

/* Caps rows [begin, end) on the calling thread. Threads may work on distinct ranges of one call at once. */
AXISCAP_API axiscap_status axiscap_cap_cpu(const axiscap_call* call, int64_t begin, int64_t end);

/* Starts a call on the current device; stream is a cudaStream_t. Returns without waiting. */
AXISCAP_API axiscap_status axiscap_cap_cuda(const axiscap_call* call, void* stream);

/* The error text of this thread's last call that did not return AXISCAP_OK. */
AXISCAP_API const char* axiscap_last_error(void);

#ifdef __cplusplus
}
#endif

#endif
