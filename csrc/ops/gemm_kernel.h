/* gemm_kernel.h - the register tile of the matrix products, once for every (instruction set, precision).
 *
 * The first half is the contract between gemm.c and its kernels. The second half is a template: a file that defines
 *
 *     KERNEL       name of the stv_gemm_kernel to make        REAL      element type
 *     VEC          vector type, VEC_LANES elements of REAL    TILE_ROWS rows of the tile, <= 14; it is 2 vectors wide
 *     SPLAT(s)     all lanes = s                              FMA(a, b, c) a*b + c
 *     TRANSPOSE_8X8(dst, ld, rows)   optional, see transpose()
 *
 * and includes this header again gets the kernel. Whatever the tile, an output is one chain of FMAs over k in order, so the tile's shape, and the
 * place of a row or column in it, never change a bit; AVX2 and AVX-512 even agree with each other. */
#ifndef STV_OPS_GEMM_KERNEL_H
#define STV_OPS_GEMM_KERNEL_H

#include <stdbool.h>
#include <stdint.h>

/* K is summed in blocks of this many, each a chain from zero, then added to y. Part of the numerical result: never tuned per machine. 256 x 32
 * floats of b are 32 KB. */
#define STV_GEMM_K_BLOCK 256
/* Row stride of the packed rows of a: constant, so that the tile addresses all its rows from one register; 17 cache lines, so that they lie in
 * different cache sets. */
#define STV_GEMM_A_STRIDE (STV_GEMM_K_BLOCK + 16)

typedef struct stv_gemm_kernel {
    int64_t size_bytes;     /* of an element */
    int64_t n_rows, n_cols; /* of a full tile */
    /* y[i*y_stride + j] = (add ? y : 0) + sum_k a[i*STV_GEMM_A_STRIDE + k] * b[k*n_cols + j], i < rows, j < cols, k < depth.
     * b has n_cols columns in any case. */
    void (*tile)(void *y, int64_t y_stride, const void *a, const void *b, int64_t rows, int64_t cols, int64_t depth, bool add);
    /* dst[j*dst_stride + i] = src[i*src_stride + j], i < rows, j < cols; may write zeros up to the next multiple of 8 rows. */
    void (*transpose)(void *dst, int64_t dst_stride, const void *src, int64_t src_stride, int64_t rows, int64_t cols);
} stv_gemm_kernel;

extern const stv_gemm_kernel stv_gemm_portable_f32, stv_gemm_portable_f64;
#if defined(__x86_64__)
extern const stv_gemm_kernel stv_gemm_avx2_f32, stv_gemm_avx2_f64, stv_gemm_avx512_f32, stv_gemm_avx512_f64;
#endif

#define STV_GEMM_PASTE_(a, b) a##_##b
#define STV_GEMM_PASTE(a, b) STV_GEMM_PASTE_(a, b)

#endif

#if defined(KERNEL)
#define LOCAL(name) STV_GEMM_PASTE(KERNEL, name)
#define TILE_COLS (2 * VEC_LANES)

/* `rows` and `n_vecs` are constants where this is inlined: every accumulator is a register. */
static inline __attribute__((always_inline)) void LOCAL(tile_body)(REAL *y, int64_t y_stride, const REAL *a, const REAL *b, int64_t cols,
                                                                   int64_t depth, bool add, const int rows, const int n_vecs)
{
    VEC acc[TILE_ROWS][2];
#pragma GCC unroll 14
    for (int i = 0; i < rows; i++) acc[i][0] = acc[i][1] = SPLAT(0);
    for (int64_t k = 0; k < depth; k++) {
        VEC b0, b1;
        __builtin_memcpy(&b0, b + k * TILE_COLS, sizeof b0);
        if (n_vecs == 2) __builtin_memcpy(&b1, b + k * TILE_COLS + VEC_LANES, sizeof b1);
#pragma GCC unroll 14
        for (int i = 0; i < rows; i++) {
            VEC ai = SPLAT(a[i * STV_GEMM_A_STRIDE + k]);
            acc[i][0] = FMA(ai, b0, acc[i][0]);
            if (n_vecs == 2) acc[i][1] = FMA(ai, b1, acc[i][1]);
        }
    }
#pragma GCC unroll 14
    for (int i = 0; i < rows; i++) {
        REAL *yi = y + i * y_stride;
        if (cols == n_vecs * VEC_LANES) {
            for (int v = 0; v < n_vecs; v++) {
                if (add) {
                    VEC old;
                    __builtin_memcpy(&old, yi + v * VEC_LANES, sizeof old);
                    acc[i][v] += old;
                }
                __builtin_memcpy(yi + v * VEC_LANES, &acc[i][v], sizeof(VEC));
            }
        } else {
            REAL row[TILE_COLS];
            __builtin_memcpy(row, acc[i], sizeof row);
            for (int64_t j = 0; j < cols; j++) yi[j] = add ? yi[j] + row[j] : row[j];
        }
    }
}

static void LOCAL(tile)(void *y, int64_t y_stride, const void *a, const void *b, int64_t rows, int64_t cols, int64_t depth, bool add)
{
    switch (rows) {
#define ROWS(n) \
    case n: \
        if (n > TILE_ROWS) return; \
        if (cols <= VEC_LANES) LOCAL(tile_body)(y, y_stride, a, b, cols, depth, add, n > TILE_ROWS ? TILE_ROWS : n, 1); \
        else LOCAL(tile_body)(y, y_stride, a, b, cols, depth, add, n > TILE_ROWS ? TILE_ROWS : n, 2); \
        return;
        ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12) ROWS(13) ROWS(14)
#undef ROWS
    }
}

static void LOCAL(transpose)(void *dst_, int64_t dst_stride, const void *src_, int64_t src_stride, int64_t rows, int64_t cols)
{
    REAL *dst = dst_;
    const REAL *src = src_;
#if defined(TRANSPOSE_8X8)
    for (int64_t i = 0; i < rows; i += 8)
        for (int64_t j = 0; j < cols; j += 8)
            TRANSPOSE_8X8(dst + j * dst_stride + i, dst_stride, src + i * src_stride + j, src_stride, rows - i, cols - j);
#else
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) dst[j * dst_stride + i] = src[i * src_stride + j];
#endif
}

const stv_gemm_kernel KERNEL = {sizeof(REAL), TILE_ROWS, TILE_COLS, LOCAL(tile), LOCAL(transpose)};

#undef LOCAL
#undef TILE_COLS
#undef KERNEL
#undef REAL
#undef VEC
#undef VEC_LANES
#undef TILE_ROWS
#undef SPLAT
#undef FMA
#undef TRANSPOSE_8X8
#endif
