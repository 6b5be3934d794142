/* gemm_transpose_avx.h - 8 x 8 floats transposed in registers; shared by the AVX2 and AVX-512 kernels, which include it under their target. */
#ifndef STV_OPS_GEMM_TRANSPOSE_AVX_H
#define STV_OPS_GEMM_TRANSPOSE_AVX_H

#include <immintrin.h>
#include <stdint.h>

/* dst[j][i] = src[i][j], i < min(rows,8), j < min(cols,8); reads nothing beyond, writes zeros for rows <= i < 8. */
static inline void transpose_8x8(float *dst, int64_t dst_stride, const float *src, int64_t src_stride, int64_t rows, int64_t cols)
{
    static const int32_t select[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    __m256 r[8], t[8];
    if (rows >= 8 && cols >= 8) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(src + i * src_stride);
    } else {
        __m256i mask = _mm256_loadu_si256((const __m256i *)(select + 8 - (cols < 8 ? cols : 8)));
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) r[i] = i < rows ? _mm256_maskload_ps(src + i * src_stride, mask) : _mm256_setzero_ps();
    }
    /* 2 x 2 within pairs of rows, 4 x 4 within 128-bit halves, then the halves. */
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++)
        if (j < cols) _mm256_storeu_ps(dst + j * dst_stride, t[j]);
}

#endif
