/* attention_kernel.h - the inner loops of attention, once for every instruction set.
 *
 * The first half is the contract between attention.c and its kernels. The second half is a template: a file that defines
 *
 *     KERNEL       name of the stv_attn_kernel to make       VEC          vector of `real`
 *     TILE_ROWS    rows of the register tile, <= 8           SPLAT(s)     all lanes = s
 *     FMA(a, b, c) a*b + c of vectors                        FMA1(a, b, c) the same of scalars
 *
 * and includes this header again gets the kernel. Every element of a product is one chain of FMAs over the summed index in order, whatever tile
 * it lands in, and softmax sums by key number: so a row's bits do not depend on its neighbours. */
#ifndef STV_OPS_ATTENTION_KERNEL_H
#define STV_OPS_ATTENTION_KERNEL_H

#include "tensor/real.h"

#include <stdbool.h>

/* Reals by which rows of scratch are padded: products round their columns up to whole vectors, softmax its row to whole groups of lanes. */
#define STV_ATTN_PAD 16

typedef struct stv_attn_left { /* a(i,k) = p[i*row + k*depth]: a matrix or its transpose */
    const real *p;
    int64_t row, depth;
} stv_attn_left;

typedef struct stv_attn_extent {
    int64_t rows, cols, depth;
} stv_attn_extent;

typedef struct stv_attn_kernel {
    /* c[i*c_row + j] = (add ? c : 0) + sum_k a(i,k) b[k*b_row + j]. Reads b and writes c up to the next whole vector of columns. */
    void (*product)(real *c, int64_t c_row, stv_attn_left a, const real *b, int64_t b_row, stv_attn_extent n, bool add);
    /* The same products for one row and one query, straight from rows that are neither transposed nor padded:
     * s[j] = sum_d q[d] k[j*k_row + d], and out[d] += sum_j p[j] v[j*v_row + d]. */
    void (*scores)(real *s, const real *q, const real *k, int64_t k_row, int64_t n_keys, int64_t head_dim);
    void (*values)(real *out, const real *p, const real *v, int64_t v_row, int64_t n_keys, int64_t head_dim);
    /* s[begin,end) becomes exp(s - max); returns max, fills the sum. Clears s from and to the next multiples of STV_ATTN_PAD. */
    real (*softmax)(double *sum, real *s, int64_t begin, int64_t end);
    /* On [begin,end): s becomes p = exp(s - lse), dp becomes ds = p (dp - delta). */
    void (*softmax_backward)(real *s, real *dp, int64_t begin, int64_t end, real lse, real delta);
} stv_attn_kernel;

#define stv_attn_portable STV_TYPED(stv_attn_portable)
#define stv_attn_avx2 STV_TYPED(stv_attn_avx2)
#define stv_attn_avx512 STV_TYPED(stv_attn_avx512)
extern const stv_attn_kernel stv_attn_portable;
#if defined(__x86_64__)
extern const stv_attn_kernel stv_attn_avx2, stv_attn_avx512;
#endif

#endif

#if defined(KERNEL)
#include "ops/fastmath.h"
#include "ops/reduce.h"

#define VEC_LANES ((int64_t)(sizeof(VEC) / sizeof(real)))
#define AHEAD 8 /* rows of b: they lie further apart than the processor looks ahead by itself */

/* `rows` and `n_vecs` are constants where this is inlined: every accumulator is a register. */
static inline __attribute__((always_inline)) void tile(real *c, int64_t c_row, stv_attn_left a, const real *b, int64_t b_row, int64_t depth, bool add,
                                                       const int rows, const int n_vecs)
{
    VEC acc[TILE_ROWS][2], b0, b1;
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        acc[i][0] = acc[i][1] = SPLAT(0);
        if (add) __builtin_memcpy(acc[i], c + i * c_row, (size_t)n_vecs * sizeof(VEC));
    }
    for (int64_t k = 0; k < depth; k++) {
        const real *bk = b + k * b_row, *later = bk + AHEAD * b_row;
        __builtin_memcpy(&b0, bk, sizeof b0);
        __builtin_prefetch(later);
        if (n_vecs == 2) {
            __builtin_memcpy(&b1, bk + VEC_LANES, sizeof b1);
            __builtin_prefetch(later + VEC_LANES);
        }
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            VEC ai = SPLAT(a.p[i * a.row + k * a.depth]);
            acc[i][0] = FMA(ai, b0, acc[i][0]);
            if (n_vecs == 2) acc[i][1] = FMA(ai, b1, acc[i][1]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) __builtin_memcpy(c + i * c_row, acc[i], (size_t)n_vecs * sizeof(VEC));
}

static void product(real *c, int64_t c_row, stv_attn_left a, const real *b, int64_t b_row, stv_attn_extent n, bool add)
{
    for (int64_t j = 0; j < n.cols; j += 2 * VEC_LANES) {
        bool wide = n.cols - j > VEC_LANES;
        for (int64_t i = 0; i < n.rows; i += TILE_ROWS) {
            stv_attn_left ai = {a.p + i * a.row, a.row, a.depth};
            real *ci = c + i * c_row + j;
            int64_t rows = n.rows - i < TILE_ROWS ? n.rows - i : TILE_ROWS;
            switch (rows) {
#define ROWS(r) \
    case r: \
        if (r > TILE_ROWS) break; \
        if (wide) tile(ci, c_row, ai, b + j, b_row, n.depth, add, r < TILE_ROWS ? r : TILE_ROWS, 2); \
        else tile(ci, c_row, ai, b + j, b_row, n.depth, add, r < TILE_ROWS ? r : TILE_ROWS, 1); \
        break;
                ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8)
#undef ROWS
            }
        }
    }
}

static void scores(real *s, const real *q, const real *k, int64_t k_row, int64_t n_keys, int64_t head_dim)
{
    int64_t j = 0;
    for (; j + 8 <= n_keys; j += 8) { /* eight chains at a time hide the latency of each */
        real acc[8] = {0};
        for (int64_t d = 0; d < head_dim; d++)
            for (int i = 0; i < 8; i++) acc[i] = FMA1(q[d], k[(j + i) * k_row + d], acc[i]);
        __builtin_memcpy(s + j, acc, sizeof acc);
    }
    for (; j < n_keys; j++) {
        real acc = 0;
        for (int64_t d = 0; d < head_dim; d++) acc = FMA1(q[d], k[j * k_row + d], acc);
        s[j] = acc;
    }
}

static void values(real *restrict out, const real *p, const real *v, int64_t v_row, int64_t n_keys, int64_t head_dim)
{
    for (int64_t j = 0; j < n_keys; j++)
        for (int64_t d = 0; d < head_dim; d++) out[d] = FMA1(p[j], v[j * v_row + d], out[d]);
}

static real softmax(double *sum, real *s, int64_t begin, int64_t end)
{
    int64_t first = begin / STV_ATTN_PAD * STV_ATTN_PAD, last = (end + STV_ATTN_PAD - 1) / STV_ATTN_PAD * STV_ATTN_PAD;
    for (int64_t j = first; j < begin; j++) s[j] = -INFINITY;
    for (int64_t j = end; j < last; j++) s[j] = -INFINITY;
    real max = stv_row_max(s + first, -INFINITY, last - first);
    for (int64_t j = first; j < last; j++) s[j] = exp_real(s[j] - max);
    *sum = stv_row_sum(s + first, last - first);
    return max;
}

static void softmax_backward(real *restrict s, real *restrict dp, int64_t begin, int64_t end, real lse, real delta)
{
    for (int64_t j = begin; j < end; j++) {
        real p = exp_real(s[j] - lse);
        s[j] = p;
        dp[j] = p * (dp[j] - delta);
    }
}

const stv_attn_kernel KERNEL = {product, scores, values, softmax, softmax_backward};
#endif
