/* gemm_pack_avx.h - 8 x 8 elements widened and transposed in registers; shared by the AVX2 and AVX-512 kernels, which include it under their target.
 * `dtype` is f32, f16 or bf16, and a constant where these are inlined. */
#ifndef STV_OPS_GEMM_PACK_AVX_H
#define STV_OPS_GEMM_PACK_AVX_H

#include "tensor/dtype.h"

#include <immintrin.h>
#include <string.h>

#define STV_INLINE static inline __attribute__((always_inline))

STV_INLINE __m256 widened_8(__m128i halves, stv_dtype dtype)
{
    if (dtype == STV_DTYPE_F16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

STV_INLINE __m256 load_8(const void *from, stv_dtype dtype)
{
    return dtype == STV_DTYPE_F32 ? _mm256_loadu_ps(from) : widened_8(_mm_loadu_si128(from), dtype);
}

/* 4 elements from each: halves of a register are put together while loading, which costs the shuffle unit little. */
STV_INLINE __m256 load_4_4(stv_stored low, stv_stored high)
{
    if (low.dtype == STV_DTYPE_F32) return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low.data)), _mm_loadu_ps(high.data), 1);
    return widened_8(_mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(_mm_loadl_epi64(low.data)), high.data)), low.dtype);
}

/* The first n < 8 elements, then zeros: reads nothing beyond. */
STV_INLINE __m256 load_part(const void *from, int64_t n, stv_dtype dtype)
{
    if (dtype == STV_DTYPE_F32) {
        static const int32_t select[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
        return _mm256_maskload_ps(from, _mm256_loadu_si256((const __m256i *)(select + 8 - n)));
    }
    uint16_t halves[8] = {0};
    memcpy(halves, from, (size_t)n * sizeof *halves);
    return widened_8(_mm_loadu_si128((const __m128i *)halves), dtype);
}

/* 4 x 4 within the 128-bit halves of eight registers: r[i], i < 4, holds columns 0-3 of rows i and i+4, r[4+i] columns 4-7; out[j] is column j. */
STV_INLINE void transpose_halves(__m256 out[8], const __m256 r[8])
{
#pragma GCC unroll 2
    for (int half = 0; half < 8; half += 4) {
        __m256 t0 = _mm256_unpacklo_ps(r[half], r[half + 1]), t1 = _mm256_unpackhi_ps(r[half], r[half + 1]);
        __m256 t2 = _mm256_unpacklo_ps(r[half + 2], r[half + 3]), t3 = _mm256_unpackhi_ps(r[half + 2], r[half + 3]);
        out[half] = _mm256_shuffle_ps(t0, t2, 0x44);
        out[half + 1] = _mm256_shuffle_ps(t0, t2, 0xEE);
        out[half + 2] = _mm256_shuffle_ps(t1, t3, 0x44);
        out[half + 3] = _mm256_shuffle_ps(t1, t3, 0xEE);
    }
}

/* out[j][i] = src[i][j], i < 8, j < 8; of bf16 also two neighbours at a time, each pair as one float. */
STV_INLINE void transposed_8x8(__m256 out[8], stv_stored src, int64_t src_stride, const bool pairs)
{
    __m256 r[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        stv_stored low = stv_stored_from(src, (i & 3) * src_stride + (i & 4) * (1 + pairs)), high = stv_stored_from(low, 4 * src_stride);
        if (pairs) low.dtype = STV_DTYPE_F32;
        r[i] = load_4_4(low, high);
    }
    transpose_halves(out, r);
}

STV_INLINE void store_columns(float *dst, int64_t dst_stride, const __m256 column[8], int64_t cols)
{
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++)
        if (j < cols) _mm256_storeu_ps(dst + j * dst_stride, column[j]);
}

/* dst[j][i] = src[i][j], i < 8, j < 8. */
STV_INLINE void transpose_8x8(float *dst, int64_t dst_stride, stv_stored src, int64_t src_stride)
{
    __m256 column[8];
    transposed_8x8(column, src, src_stride, false);
    store_columns(dst, dst_stride, column, 8);
}

/* The same for i < rows <= 8, j < cols <= 8: reads nothing beyond, writes zeros for rows <= i < 8. */
STV_INLINE void transpose_part(float *dst, int64_t dst_stride, stv_stored src, int64_t src_stride, int64_t rows, int64_t cols)
{
    __m256 in[8], r[8], column[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const void *row = stv_stored_from(src, i * src_stride).data;
        in[i] = i >= rows ? _mm256_setzero_ps() : cols == 8 ? load_8(row, src.dtype) : load_part(row, cols, src.dtype);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2f128_ps(in[i], in[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(in[i], in[i + 4], 0x31);
    }
    transpose_halves(column, r);
    store_columns(dst, dst_stride, column, cols);
}

#endif
