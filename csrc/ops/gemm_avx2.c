/* gemm_avx2.c - the tile with 256-bit registers: 6 x 2 accumulators, 2 of b, 1 of a, of 16. */
#include "base/target.h"
#include "ops/gemm_kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
STV_TARGET_BEGIN("avx2,fma,f16c")
#include "ops/gemm_row_avx.h"

#define KERNEL stv_gemm_avx2_f32
#define REAL float
#define VEC __m256
#define VEC_LANES 8
#define TILE_ROWS 6
#define TILE_VECS 2
#define SPLAT(s) _mm256_set1_ps(s)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define LOAD_HALVES(p, dtype) load_8(p, dtype)
#define TRANSPOSE_8X8 transpose_8x8
#define TRANSPOSE_PART transpose_part
#define ROW row
#include "ops/gemm_kernel.h"

#define KERNEL stv_gemm_avx2_f64
#define REAL double
#define VEC __m256d
#define VEC_LANES 4
#define TILE_ROWS 6
#define TILE_VECS 2
#define SPLAT(s) _mm256_set1_pd(s)
#define FMA(a, b, c) _mm256_fmadd_pd(a, b, c)
#include "ops/gemm_kernel.h"
STV_TARGET_END
#endif
