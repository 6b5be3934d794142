/* dtype.h - element types. A model computes in f32, or in f64 as the exact check. f16 and bf16 are storage only: frozen weights may lie in them, and are
 * widened where they are read (tensor/widen.h). */
#ifndef STV_TENSOR_DTYPE_H
#define STV_TENSOR_DTYPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum stv_dtype { STV_DTYPE_F32 = 0, STV_DTYPE_F64 = 1, STV_DTYPE_F16 = 2, STV_DTYPE_BF16 = 3 } stv_dtype;
enum { STV_N_DTYPES = 4 };

static inline size_t stv_dtype_size(stv_dtype dtype)
{
    static const unsigned char sizes[STV_N_DTYPES] = {4, 8, 2, 2};
    return sizes[dtype];
}

static inline const char *stv_dtype_name(stv_dtype dtype)
{
    static const char *const names[STV_N_DTYPES] = {"f32", "f64", "f16", "bf16"};
    return names[dtype];
}

/* Whether every value of `from` is a value of `to`. */
static inline bool stv_dtype_widens(stv_dtype from, stv_dtype to)
{
    return from == to || to == STV_DTYPE_F64 || (to == STV_DTYPE_F32 && from > STV_DTYPE_F64);
}

/* Values as they lie: a weight, in the precision it was bound in. */
typedef struct stv_stored {
    const void *data;
    stv_dtype dtype;
} stv_stored;

/* From element i on. */
static inline stv_stored stv_stored_from(stv_stored s, int64_t i)
{
    s.data = (const char *)s.data + i * (int64_t)stv_dtype_size(s.dtype);
    return s;
}

#endif
