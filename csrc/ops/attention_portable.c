/* attention_portable.c - 4 x 2 accumulators of 16 bytes, which any SIMD machine has; no fused multiply-add is assumed. */
#include "ops/attention_kernel.h"

typedef real vec __attribute__((vector_size(16)));

static inline vec splat(real s)
{
#if STV_REAL_BITS == 32
    return (vec){s, s, s, s};
#else
    return (vec){s, s};
#endif
}

#define KERNEL stv_attn_portable
#define TILE_ROWS 4
#define VEC vec
#define SPLAT(s) splat(s)
#define FMA(a, b, c) ((a) * (b) + (c))
#define FMA1(a, b, c) ((a) * (b) + (c))
#include "ops/attention_kernel.h"
