/* gemm_transpose_avx.h - 8 x 8 floats transposed in registers; shared by the AVX2 and AVX-512 kernels, which include it under their target. */
#ifndef STV_OPS_GEMM_TRANSPOSE_AVX_H
#define STV_OPS_GEMM_TRANSPOSE_AVX_H

#include <immintrin.h>
#include <stdint.h>

/* 4 x 4 within the 128-bit halves of eight registers: r[i], i < 4, holds columns 0-3 of rows i and i+4, r[4+i] columns 4-7. */
static inline void store_transposed(float *dst, int64_t dst_stride, const __m256 r[8], int64_t cols)
{
#pragma GCC unroll 2
    for (int half = 0; half < 8; half += 4) {
        __m256 t0 = _mm256_unpacklo_ps(r[half], r[half + 1]), t1 = _mm256_unpackhi_ps(r[half], r[half + 1]);
        __m256 t2 = _mm256_unpacklo_ps(r[half + 2], r[half + 3]), t3 = _mm256_unpackhi_ps(r[half + 2], r[half + 3]);
        __m256 out[4] = {_mm256_shuffle_ps(t0, t2, 0x44), _mm256_shuffle_ps(t0, t2, 0xEE), _mm256_shuffle_ps(t1, t3, 0x44),
                         _mm256_shuffle_ps(t1, t3, 0xEE)};
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            if (half + j < cols) _mm256_storeu_ps(dst + (half + j) * dst_stride, out[j]);
    }
}

/* dst[j][i] = src[i][j], i < 8, j < 8. Halves are put together while loading, which costs the shuffle unit nothing. */
static inline void transpose_8x8(float *dst, int64_t dst_stride, const float *src, int64_t src_stride)
{
    __m256 r[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const float *low = src + (i & 3) * src_stride + (i & 4);
        r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(low + 4 * src_stride), 1);
    }
    store_transposed(dst, dst_stride, r, 8);
}

/* The same for i < rows <= 8, j < cols <= 8: reads nothing beyond, writes zeros for rows <= i < 8. */
static inline void transpose_part(float *dst, int64_t dst_stride, const float *src, int64_t src_stride, int64_t rows, int64_t cols)
{
    static const int32_t select[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    __m256i mask = _mm256_loadu_si256((const __m256i *)(select + 8 - cols));
    __m256 in[8], r[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) in[i] = i < rows ? _mm256_maskload_ps(src + i * src_stride, mask) : _mm256_setzero_ps();
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2f128_ps(in[i], in[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(in[i], in[i + 4], 0x31);
    }
    store_transposed(dst, dst_stride, r, cols);
}

#endif
