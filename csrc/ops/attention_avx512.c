/* attention_avx512.c - 8 x 2 accumulators: enough to keep two FMA units busy, and a tile that divides the block of queries. */
#include "base/target.h"
#include "ops/attention_kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
STV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")

#define KERNEL stv_attn_avx512
#define TILE_ROWS 8
#if STV_REAL_BITS == 32
#define VEC __m512
#define SPLAT(s) _mm512_set1_ps(s)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define FMA1(a, b, c) __builtin_fmaf(a, b, c)
#else
#define VEC __m512d
#define SPLAT(s) _mm512_set1_pd(s)
#define FMA(a, b, c) _mm512_fmadd_pd(a, b, c)
#define FMA1(a, b, c) __builtin_fma(a, b, c)
#endif
#include "ops/attention_kernel.h"
STV_TARGET_END
#endif
