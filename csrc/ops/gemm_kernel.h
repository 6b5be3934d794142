/* gemm_kernel.h - the register tile of the matrix products, once for every (instruction set, precision).
 *
 * The first half is the contract between gemm.c and its kernels. The second half is a template: a file that defines
 *
 *     KERNEL       name of the stv_gemm_kernel to make        REAL      element type
 *     VEC          vector type, VEC_LANES elements of REAL    TILE_ROWS rows of the tile, <= 8; it is TILE_VECS vectors wide, 2 or 3
 *     SPLAT(s)     all lanes = s                              FMA(a, b, c) a*b + c
 *     LOAD_HALVES(p, dtype)           optional, a vector from VEC_LANES halves
 *     TRANSPOSE_8X8, TRANSPOSE_PART   optional, see transpose()
 *     ROW                             optional, the kernel's row()
 *
 * and includes this header again gets the kernel. Whatever the tile, an output is one chain of FMAs over k in order, so the tile's shape, and the
 * place of a row or column in it, never change a bit; AVX2 and AVX-512 even agree with each other. */
#ifndef STV_OPS_GEMM_KERNEL_H
#define STV_OPS_GEMM_KERNEL_H

#include "tensor/widen.h"

/* K is summed in blocks of this many, each a chain from zero, then added to y. Part of the numerical result: never tuned per machine. The rows
 * of a stay in L1 while b streams through from L2. */
#define STV_GEMM_K_BLOCK 256

typedef struct stv_gemm_extent {
    int64_t rows, cols, depth;
} stv_gemm_extent;

typedef struct stv_gemm_kernel {
    stv_dtype dtype;
    int64_t size_bytes;              /* of an element */
    int64_t n_rows, n_cols, n_lanes; /* of a full tile, and of a vector; a tile of one vector may have 2 n_rows */
    /* y[i*y_stride + j] = (add ? y : 0) + sum_k a[i*a_stride + k] * b[k*b_stride + j], i < rows, j < cols <= n_cols, k < depth. of b are read up to the next multiple of n_lanes. */
    void (*tile)(void *y, int64_t y_stride, const void *a, int64_t a_stride, const void *b, int64_t b_stride, stv_gemm_extent size, bool add);
    /* dst[i*dst_stride + j] = src[i*src_stride + j], i < rows, j < cols, widened. */
    void (*copy)(void *dst, int64_t dst_stride, stv_stored src, int64_t src_stride, int64_t rows, int64_t cols);
    /* dst[j*dst_stride + i] = src[i*src_stride + j], i < rows, j < cols, widened; may write zeros up to the next multiple of 8 rows. */
    void (*transpose)(void *dst, int64_t dst_stride, stv_stored src, int64_t src_stride, int64_t rows, int64_t cols);
    /* y[j] = (add ? y[j] : 0) + sum_k a[k] * b[j*b_stride + k], j < cols, k < depth: what tile() gives after transpose(), without the detour through
     * memory. NULL: there is none. */
    void (*row)(void *y, const void *a, stv_stored b, int64_t b_stride, int64_t cols, int64_t depth, bool add);
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
#define TILE_COLS (TILE_VECS * VEC_LANES)
#if !defined(ROW)
#define ROW NULL
#endif

/* The first `cols` columns of a tile that is wider: half vectors, then the rest. */
static __attribute__((noinline)) void LOCAL(store_part)(REAL *y, int64_t y_stride, const REAL *tile, int64_t rows, int64_t cols, bool add)
{
    enum { CHUNK = VEC_LANES / 2 };
    for (int64_t i = 0; i < rows; i++, y += y_stride, tile += TILE_COLS) {
        int64_t j = 0;
        for (; j + CHUNK <= cols; j += CHUNK) {
            REAL sum[CHUNK];
            for (int c = 0; c < CHUNK; c++) sum[c] = add ? y[j + c] + tile[j + c] : tile[j + c];
            __builtin_memcpy(y + j, sum, sizeof sum);
        }
        for (; j < cols; j++) y[j] = add ? y[j] + tile[j] : tile[j];
    }
}

/* `rows` and `n_vecs` are constants where this is inlined: every accumulator is a register. */
static inline __attribute__((always_inline)) void LOCAL(tile_body)(REAL *y, int64_t y_stride, const REAL *a, int64_t a_stride, const REAL *b,
                                                                   int64_t b_stride, stv_gemm_extent size, bool add, const int rows, const int n_vecs)
{
    VEC acc[TILE_ROWS][TILE_VECS];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
        for (int v = 0; v < n_vecs; v++) {
            acc[i][v] = SPLAT(0);
            __builtin_prefetch(y + i * y_stride + v * VEC_LANES, 1);
        }
    for (int64_t k = 0; k < size.depth; k++) {
        VEC bk[TILE_VECS];
#pragma GCC unroll 3
        for (int v = 0; v < n_vecs; v++) __builtin_memcpy(&bk[v], b + k * b_stride + v * VEC_LANES, sizeof(VEC));
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            VEC ai = SPLAT(a[i * a_stride + k]);
#pragma GCC unroll 3
            for (int v = 0; v < n_vecs; v++) acc[i][v] = FMA(ai, bk[v], acc[i][v]);
        }
    }
    if (size.cols < n_vecs * VEC_LANES) {
        REAL tile[TILE_ROWS][TILE_COLS];
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
            for (int v = 0; v < n_vecs; v++) __builtin_memcpy(&tile[i][v * VEC_LANES], &acc[i][v], sizeof(VEC));
        LOCAL(store_part)(y, y_stride, tile[0], rows, size.cols, add);
        return;
    }
    /* All loads before all stores: where rows lie 4 KB apart, a load would wait for the store of the row above, whose address ends alike. */
    if (add) {
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
            for (int v = 0; v < n_vecs; v++) {
                VEC old;
                __builtin_memcpy(&old, y + i * y_stride + v * VEC_LANES, sizeof old);
                acc[i][v] += old;
            }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
        for (int v = 0; v < n_vecs; v++) __builtin_memcpy(y + i * y_stride + v * VEC_LANES, &acc[i][v], sizeof(VEC));
}

static void LOCAL(tile)(void *y, int64_t y_stride, const void *a, int64_t a_stride, const void *b, int64_t b_stride, stv_gemm_extent size, bool add)
{
    int64_t n_vecs = (size.cols + VEC_LANES - 1) / VEC_LANES;
    switch (size.rows * 4 + n_vecs) {
#define TILE(n, v) \
    case n * 4 + v: \
        if (n <= TILE_ROWS && v <= TILE_VECS) LOCAL(tile_body)(y, y_stride, a, a_stride, b, b_stride, size, add, n, v); \
        return;
#define ROWS(n) TILE(n, 1) TILE(n, 2) TILE(n, 3)
        ROWS(1)
        ROWS(2)
        ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) TILE(9, 1) TILE(10, 1) TILE(11, 1) TILE(12, 1) TILE(13, 1) TILE(14, 1) TILE(15, 1) TILE(16, 1)
#undef ROWS
#undef TILE
    }
}

/* ---- packing: `src.dtype` is a constant where the bodies are inlined ---- */

static inline __attribute__((always_inline)) REAL LOCAL(load)(stv_stored src, int64_t i)
{
    switch (src.dtype) {
    case STV_DTYPE_F32: return ((const float *)src.data)[i];
    case STV_DTYPE_F64: return (REAL)((const double *)src.data)[i]; /* of a kernel of doubles */
    case STV_DTYPE_F16: return stv_widen_f16(((const uint16_t *)src.data)[i]);
    case STV_DTYPE_BF16: return stv_widen_bf16(((const uint16_t *)src.data)[i]);
    }
    return 0;
}

static inline __attribute__((always_inline)) VEC LOCAL(load_vec)(stv_stored src, int64_t i)
{
    REAL lanes[VEC_LANES];
    VEC v;
#if defined(LOAD_HALVES)
    if (src.dtype == STV_DTYPE_F16 || src.dtype == STV_DTYPE_BF16) return LOAD_HALVES((const uint16_t *)src.data + i, src.dtype);
#endif
    for (int lane = 0; lane < VEC_LANES; lane++) lanes[lane] = LOCAL(load)(src, i + lane);
    __builtin_memcpy(&v, lanes, sizeof v);
    return v;
}

static inline __attribute__((always_inline)) void LOCAL(copy_body)(REAL *dst, int64_t dst_stride, stv_stored src, int64_t src_stride, int64_t rows,
                                                                   int64_t cols)
{
    int64_t whole = cols - cols % VEC_LANES;
    for (int64_t i = 0; i < rows; i++, dst += dst_stride, src = stv_stored_from(src, src_stride)) {
        for (int64_t j = 0; j < whole; j += VEC_LANES) {
            VEC v = LOCAL(load_vec)(src, j);
            __builtin_memcpy(dst + j, &v, sizeof v);
        }
        for (int64_t j = whole; j < cols; j++) dst[j] = LOCAL(load)(src, j);
    }
}

static inline __attribute__((always_inline)) void LOCAL(transpose_body)(REAL *dst, int64_t dst_stride, stv_stored src, int64_t src_stride,
                                                                        int64_t rows, int64_t cols)
{
#if defined(TRANSPOSE_8X8)
    for (int64_t i = 0; i < rows; i += 8) {
        int64_t j = 0, n_rows = rows - i < 8 ? rows - i : 8;
        if (n_rows == 8)
            for (; j + 8 <= cols; j += 8) TRANSPOSE_8X8(dst + j * dst_stride + i, dst_stride, stv_stored_from(src, i * src_stride + j), src_stride);
        for (; j < cols; j += 8)
            TRANSPOSE_PART(dst + j * dst_stride + i, dst_stride, stv_stored_from(src, i * src_stride + j), src_stride, n_rows,
                           cols - j < 8 ? cols - j : 8);
    }
#else
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) dst[j * dst_stride + i] = LOCAL(load)(src, i * src_stride + j);
#endif
}

#define FOR_EACH_DTYPE(body) \
    switch (src.dtype) { \
    case STV_DTYPE_F32: body(dst, dst_stride, (stv_stored){src.data, STV_DTYPE_F32}, src_stride, rows, cols); return; \
    case STV_DTYPE_F64: body(dst, dst_stride, (stv_stored){src.data, STV_DTYPE_F64}, src_stride, rows, cols); return; \
    case STV_DTYPE_F16: body(dst, dst_stride, (stv_stored){src.data, STV_DTYPE_F16}, src_stride, rows, cols); return; \
    case STV_DTYPE_BF16: body(dst, dst_stride, (stv_stored){src.data, STV_DTYPE_BF16}, src_stride, rows, cols); return; \
    }

static void LOCAL(copy)(void *dst, int64_t dst_stride, stv_stored src, int64_t src_stride, int64_t rows, int64_t cols)
{
    FOR_EACH_DTYPE(LOCAL(copy_body))
}

static void LOCAL(transpose)(void *dst, int64_t dst_stride, stv_stored src, int64_t src_stride, int64_t rows, int64_t cols)
{
    FOR_EACH_DTYPE(LOCAL(transpose_body))
}

#undef FOR_EACH_DTYPE

const stv_gemm_kernel KERNEL = {sizeof(REAL) == sizeof(double) ? STV_DTYPE_F64 : STV_DTYPE_F32,
                                sizeof(REAL),
                                TILE_ROWS,
                                TILE_COLS,
                                VEC_LANES,
                                LOCAL(tile),
                                LOCAL(copy),
                                LOCAL(transpose),
                                ROW};

#undef LOCAL
#undef ROW
#undef TILE_COLS
#undef KERNEL
#undef REAL
#undef VEC
#undef VEC_LANES
#undef TILE_ROWS
#undef TILE_VECS
#undef SPLAT
#undef FMA
#undef LOAD_HALVES
#undef TRANSPOSE_8X8
#undef TRANSPOSE_PART
#endif
