/* attention_avx2.c - 6 x 2 accumulators, 2 of b, 1 of a, of 16 registers. */
#include "base/target.h"
#include "ops/attention_kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
STV_TARGET_BEGIN("avx2,fma")

#define KERNEL stv_attn_avx2
#define TILE_ROWS 6
#if STV_REAL_BITS == 32
#define VEC __m256
#define SPLAT(s) _mm256_set1_ps(s)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define FMA1(a, b, c) __builtin_fmaf(a, b, c)
#else
#define VEC __m256d
#define SPLAT(s) _mm256_set1_pd(s)
#define FMA(a, b, c) _mm256_fmadd_pd(a, b, c)
#define FMA1(a, b, c) __builtin_fma(a, b, c)
#endif
#include "ops/attention_kernel.h"
STV_TARGET_END
#endif
