/* gemm_avx512.c - the tile with 512-bit registers: 8 x 3 accumulators, 3 of b, 1 of a, of 32. Per k 11 loads feed 24 FMAs: 14 x 2
 * (16 for 28) reached 94 % of the register peak in L1 and 88 % out of L2, this 99 and 97 (Ice Lake). */
#include "base/target.h"
#include "ops/gemm_kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
STV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "ops/gemm_row_avx.h"

STV_INLINE __m512 load_16(const void *from, stv_dtype dtype)
{
    __m256i halves = _mm256_loadu_si256(from);
    if (dtype == STV_DTYPE_F16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

#define KERNEL stv_gemm_avx512_f32
#define REAL float
#define VEC __m512
#define VEC_LANES 16
#define TILE_ROWS 8
#define TILE_VECS 3
#define SPLAT(s) _mm512_set1_ps(s)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define LOAD_HALVES(p, dtype) load_16(p, dtype)
#define TRANSPOSE_8X8 transpose_8x8
#define TRANSPOSE_PART transpose_part
#define ROW row
#include "ops/gemm_kernel.h"

#define KERNEL stv_gemm_avx512_f64
#define REAL double
#define VEC __m512d
#define VEC_LANES 8
#define TILE_ROWS 8
#define TILE_VECS 3
#define SPLAT(s) _mm512_set1_pd(s)
#define FMA(a, b, c) _mm512_fmadd_pd(a, b, c)
#include "ops/gemm_kernel.h"
STV_TARGET_END
#endif
