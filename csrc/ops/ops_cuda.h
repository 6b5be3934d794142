/* ops_cuda.h - the one door to CUDA: a table with a slot per direction, in data-flow order.
 *
 * ops_cuda.cu fills it; a CPU-only build links ops_cuda_none.c, which has no table, so no other source asks which backend was built. An operator
 * without a slot is an error when a model is opened on a device, never a silent computation on the CPU.
 *
 * Every pointer is device memory, every call is queued on `stream` (a cudaStream_t) and returns before it is done. Arguments and results are those
 * of the f32 CPU operator of the same name, which is the specification and the test oracle. Errors: device, with CUDA's text. */
#ifndef STV_OPS_CUDA_H
#define STV_OPS_CUDA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "base/status.h"

typedef struct stv_ops_cuda {
    stv_status (*rmsnorm_forward)(void *stream, float *y, float *rstd, const float *in, const float *weight, int64_t rows, int64_t D, double eps);
    stv_status (*rmsnorm_backward_add)(void *stream, float *din, float *dweight, const float *dy, const float *in, const float *weight,
                                       const float *rstd, int64_t rows, int64_t D);
} stv_ops_cuda;

/* NULL: this build has no CUDA. */
const stv_ops_cuda *stv_ops_cuda_table(void);

/* The slots' functions, for ops_cuda.cu alone. */
stv_status stv_rmsnorm_forward_cuda(void *stream, float *y, float *rstd, const float *in, const float *weight, int64_t rows, int64_t D, double eps);
stv_status stv_rmsnorm_backward_add_cuda(void *stream, float *din, float *dweight, const float *dy, const float *in, const float *weight,
                                         const float *rstd, int64_t rows, int64_t D);

#ifdef __cplusplus
}
#endif

#endif
