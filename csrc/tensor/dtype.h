/* dtype.h - element types. A model computes in f32, or in f64 as the exact check; f16, bf16 and quantised blocks are storage
 * of frozen weights only and join this enum with their kernels. */
#ifndef STV_TENSOR_DTYPE_H
#define STV_TENSOR_DTYPE_H

#include <stddef.h>

typedef enum stv_dtype { STV_DTYPE_F32 = 0, STV_DTYPE_F64 = 1 } stv_dtype;

static inline size_t stv_dtype_size(stv_dtype dtype) { return dtype == STV_DTYPE_F64 ? 8 : 4; }
static inline const char *stv_dtype_name(stv_dtype dtype) { return dtype == STV_DTYPE_F64 ? "f64" : "f32"; }

#endif
