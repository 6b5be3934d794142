/* gemm_avx512.c - the tile with 512-bit registers: 14 x 2 accumulators, 2 of b, 1 of a, of 32. Per k 16 loads feed 28 FMAs. */
#include "ops/gemm_kernel.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#include "ops/gemm_transpose_avx.h"

#define KERNEL stv_gemm_avx512_f32
#define REAL float
#define VEC __m512
#define VEC_LANES 16
#define TILE_ROWS 14
#define SPLAT(s) _mm512_set1_ps(s)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define TRANSPOSE_8X8 transpose_8x8
#include "ops/gemm_kernel.h"

#define KERNEL stv_gemm_avx512_f64
#define REAL double
#define VEC __m512d
#define VEC_LANES 8
#define TILE_ROWS 14
#define SPLAT(s) _mm512_set1_pd(s)
#define FMA(a, b, c) _mm512_fmadd_pd(a, b, c)
#include "ops/gemm_kernel.h"
#endif
