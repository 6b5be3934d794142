/* gemm_row_avx.h - one row of y against a weight as it lies: its rows are transposed in registers, 8 at a time, and meet the FMAs there. Shared by the
 * AVX2 and AVX-512 kernels, which include it under their target. Out of L2 an element of bf16 costs 0.11 ns, packed for a tile 0.16 (Ice Lake). */
#ifndef STV_OPS_GEMM_ROW_AVX_H
#define STV_OPS_GEMM_ROW_AVX_H

#include "ops/gemm_pack_avx.h"
#include "tensor/widen.h"

enum { ROW_GROUPS = 3 }; /* of 8 columns at once: chains of FMAs that hide the latency of one another */

/* out[j][i] = src[i][j], i < 8, j < 16. Pairs of bf16 take half the shuffles, and are widened where they belong. */
STV_INLINE void transposed_8x16(__m256 out[16], stv_stored src, int64_t src_stride)
{
    if (src.dtype != STV_DTYPE_BF16) {
        transposed_8x8(out, src, src_stride, false);
        transposed_8x8(out + 8, stv_stored_from(src, 8), src_stride, false);
        return;
    }
    __m256 pairs[8];
    transposed_8x8(pairs, src, src_stride, true);
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        __m256i pair = _mm256_castps_si256(pairs[j]);
        out[2 * j] = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
        out[2 * j + 1] = _mm256_castsi256_ps(_mm256_and_si256(pair, _mm256_set1_epi32((int32_t)0xFFFF0000)));
    }
}

STV_INLINE float load_1(stv_stored from, int64_t i)
{
    if (from.dtype == STV_DTYPE_F32) return ((const float *)from.data)[i];
    uint16_t bits = ((const uint16_t *)from.data)[i];
    return from.dtype == STV_DTYPE_F16 ? stv_widen_f16(bits) : stv_widen_bf16(bits);
}

/* 8 n columns. */
STV_INLINE void row_columns(float *y, const float *a, stv_stored b, int64_t b_stride, int64_t depth, bool add, const int n)
{
    __m256 acc[ROW_GROUPS];
    int64_t k = 0;
#pragma GCC unroll 4
    for (int g = 0; g < n; g++) acc[g] = _mm256_setzero_ps();
    for (; k + 16 <= depth; k += 16)
#pragma GCC unroll 4
        for (int g = 0; g < n; g++) {
            __m256 column[16];
            transposed_8x16(column, stv_stored_from(b, 8 * g * b_stride + k), b_stride);
#pragma GCC unroll 16
            for (int j = 0; j < 16; j++) acc[g] = _mm256_fmadd_ps(_mm256_set1_ps(a[k + j]), column[j], acc[g]);
        }
    for (; k < depth; k++)
        for (int g = 0; g < n; g++) {
            float column[8];
            for (int i = 0; i < 8; i++) column[i] = load_1(b, (8 * g + i) * b_stride + k);
            acc[g] = _mm256_fmadd_ps(_mm256_set1_ps(a[k]), _mm256_loadu_ps(column), acc[g]);
        }
    for (int g = 0; g < n; g++) _mm256_storeu_ps(y + 8 * g, add ? _mm256_add_ps(_mm256_loadu_ps(y + 8 * g), acc[g]) : acc[g]);
}

STV_INLINE void row_body(float *y, const float *a, stv_stored b, int64_t b_stride, int64_t cols, int64_t depth, bool add)
{
    int64_t j = 0;
    for (; j + 8 * ROW_GROUPS <= cols; j += 8 * ROW_GROUPS) row_columns(y + j, a, stv_stored_from(b, j * b_stride), b_stride, depth, add, ROW_GROUPS);
    for (; j + 8 <= cols; j += 8) row_columns(y + j, a, stv_stored_from(b, j * b_stride), b_stride, depth, add, 1);
    for (; j < cols; j++) {
        float sum = 0;
        for (int64_t k = 0; k < depth; k++) sum = __builtin_fmaf(a[k], load_1(b, j * b_stride + k), sum);
        y[j] = add ? y[j] + sum : sum;
    }
}

static void row(void *y, const void *a, stv_stored b, int64_t b_stride, int64_t cols, int64_t depth, bool add)
{
    switch (b.dtype) {
    case STV_DTYPE_F32: row_body(y, a, (stv_stored){b.data, STV_DTYPE_F32}, b_stride, cols, depth, add); return;
    case STV_DTYPE_F16: row_body(y, a, (stv_stored){b.data, STV_DTYPE_F16}, b_stride, cols, depth, add); return;
    case STV_DTYPE_BF16: row_body(y, a, (stv_stored){b.data, STV_DTYPE_BF16}, b_stride, cols, depth, add); return;
    case STV_DTYPE_F64: return;
    }
}

#endif
