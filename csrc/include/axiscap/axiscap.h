/* AxisCap for programs without Python or torch: activation capping on raw pointers, on a CPU or a CUDA GPU.
 *
 * For a row x and its slot's directions k, in order, in float32: p = <x, v_k>; if p < tau_k: x += (tau_k - p) * v_k
 * (arXiv 2601.10387, eq. 1); with targets t and lifts u, x += (t_k - p) * u_k. A row in which nothing fires is not
 * written, nor is one that is not finite, whose norm is beyond its limit, or that would not be finite once it is
 * corrected and rounded to its dtype: its projections are NaN. Every function checks sizes and pointers before anything
 * is written, and no C++ exception leaves it.
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

/* One call. Zero it, set what is needed, and set size to sizeof(axiscap_call). Strides are in elements. */
typedef struct axiscap_call {
  int64_t size;

  void* hidden;          /* (rows, hidden_size); changed in place, unless residual or out is given */
  int64_t hidden_stride; /* at least hidden_size */
  void* residual;        /* NULL, or the rows are hidden + residual and the correction goes into residual */
  int64_t residual_stride;
  void* out; /* NULL, or where the capped copy of hidden goes */
  int64_t out_stride;
  int64_t rows;
  int64_t hidden_size;
  int32_t dtype;        /* axiscap_dtype of hidden, residual, out and weight */
  int32_t project_only; /* not 0: nothing is capped, projections are reported; floors may be NULL */

  const float* axes;    /* (num_slots, directions, hidden_size), contiguous, unit rows */
  const float* lifts;   /* NULL: the axes; or like axes: a row is read along its axis, and corrected along its lift, of
                           which <axis, lift> must be 1 (or a strength between 0 and 1), with elements below 2^60 */
  const float* floors;  /* (num_slots, directions): a row below fires; -INFINITY switches a direction off */
  const float* targets; /* NULL: the floors; or like floors, and at least them: the projection that such a row gets */
  const float* norm_limits; /* NULL, or (num_slots,), positive: a row with a larger norm is left alone */
  const int32_t* slots;     /* (rows,): the bank's slot of each row, -1 for a row to leave alone; NULL: slot 0 */
  int64_t num_slots;
  int64_t directions; /* at most 64 */

  float* projections; /* NULL, or (rows, directions): <x, v_k> before the cap, NaN for a row left alone */

  const void*
      weight; /* NULL, or (hidden_size,): residual <- cap(hidden + residual), and hidden becomes its RMS norm, */
  float eps;  /* hidden <- residual / sqrt(mean(residual^2) + eps) * (weight + weight_bias) */
  float weight_bias;

  void* quantized; /* NULL, or where the norm goes instead, in fp8 (E4M3), over a scale: (rows, hidden_size) */
  int64_t quantized_stride;
  const float* scale; /* the scale of all rows, or */
  float* scales;      /* (rows,): where each row's own goes, its largest |element| / 448 but at least 1 / (448 * 512) */
} axiscap_call;

/* The library's AXISCAP_VERSION. */
AXISCAP_API int axiscap_version(void);

/* Caps rows [begin, end) on the calling thread. Threads may work on distinct ranges of one call at once. */
AXISCAP_API axiscap_status axiscap_cap_cpu(const axiscap_call* call, int64_t begin, int64_t end);

/* Starts a call on the current device; stream is a cudaStream_t. Returns without waiting. */
AXISCAP_API axiscap_status axiscap_cap_cuda(const axiscap_call* call, void* stream);

/* What the last call of this thread that did not return AXISCAP_OK had to say. */
AXISCAP_API const char* axiscap_last_error(void);

#ifdef __cplusplus
}
#endif

#endif
