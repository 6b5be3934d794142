/* gemm.c - one driver for every matrix product.
 *
 *   y is cut into blocks, one task each. A task, for one K block after another, for some 512 of its columns after others:
 *     packs those columns of b into panels as wide as the register tile, widened if stored narrower      (L2)
 *     for every strip of rows: copies those rows of a, the first time (L3, L1), runs the tile along the panels
 *   An operand that is used once or twice and lies the right way is read in place. A narrow y is computed transposed.
 *
 * Packing is also where the three products (nt, nn, tn) become one: a operand comes as it lies, or transposed.
 *
 * Batch invariance is built in, not arranged: an output is a chain of FMAs over k in order, K block by K block, whatever M, the tile or the block
 * (gemm_kernel.h). Edges run on the same tile with fewer rows, or with zero columns that are not stored.
 *
 * The road not taken: OpenBLAS for large products. Alone it is not batch invariant (it changes kernels with M*N*K), so it would be called on row
 * tiles of one fixed size. Measured on one Ice Lake core at N = K = 2048 (GFLOP/s, register peak 175): M = 1408 ours 136, OpenBLAS free to choose 124,
 * on tiles of 128 or 256 rows 90 to 92; one row, N = K = 4096 (a decoding step): ours 5 ms, tiles 42 to 73, free 12. So it serves only the product
 * that needs no batch invariance, the large weight gradient, and that only where there is no AVX-512 (gemm_blas.h).
 */
#define STV_REAL_BITS 32 /* gemm.h names both precisions; this file is compiled once and uses neither "real" */
#include "ops/gemm.h"

#include "base/cpu.h"
#include "base/watch.h"
#include "ops/gemm_blas.h"
#include "ops/gemm_kernel.h"

#include <string.h>

#define B_BLOCK_BYTES 2048                  /* 512 columns of floats: with 256 rows, 512 KB of the L2 cache; wider packs a less often */
#define SMALL_FLOP 200000                   /* below, waking a thread costs more than it brings */
#define MAX_ROWS 2048                       /* of a block: with 256 of K, 2 MB of a are kept packed for all its columns */
#define GROUP 4                             /* strips packed at once */
#define A_STRIDE (STV_GEMM_K_BLOCK + 16)    /* of packed rows of a: 17 cache lines, so that rows lie in different sets */
#define A_IN_PLACE 3                        /* panels */
#define MAX_PANELS (B_BLOCK_BYTES / 32 + 1) /* no tile is narrower than 32 bytes */
#define B_IN_PLACE 2                        /* strips */
#define ROW_COLUMNS 24                      /* what a kernel's row() does at once */
#define SMALL_B (1 << 15)                   /* bytes that stay in L1 as they lie */

/* ---- kernels ------------------------------------------------------------------------------------------------------------- */

typedef float f32x4 __attribute__((vector_size(16)));
typedef double f64x2 __attribute__((vector_size(16)));

#define KERNEL stv_gemm_portable_f32
#define REAL float
#define VEC f32x4
#define VEC_LANES 4
#define TILE_ROWS 6
#define TILE_VECS 2
#define SPLAT(s) ((f32x4){(s), (s), (s), (s)})
#define FMA(a, b, c) ((a) * (b) + (c))
#include "ops/gemm_kernel.h"

#define KERNEL stv_gemm_portable_f64
#define REAL double
#define VEC f64x2
#define VEC_LANES 2
#define TILE_ROWS 6
#define TILE_VECS 2
#define SPLAT(s) ((f64x2){(s), (s)})
#define FMA(a, b, c) ((a) * (b) + (c))
#include "ops/gemm_kernel.h"

static const stv_gemm_kernel *choose_kernel(stv_dtype dtype)
{
#if defined(__x86_64__)
    static const stv_gemm_kernel *const table[3][2] = {
        [STV_CPU_PORTABLE] = {&stv_gemm_portable_f32, &stv_gemm_portable_f64},
        [STV_CPU_AVX2] = {&stv_gemm_avx2_f32, &stv_gemm_avx2_f64},
        [STV_CPU_AVX512] = {&stv_gemm_avx512_f32, &stv_gemm_avx512_f64},
    };
    return table[stv_cpu()][dtype];
#else
    return dtype == STV_DTYPE_F32 ? &stv_gemm_portable_f32 : &stv_gemm_portable_f64;
#endif
}

/* ---- driver -------------------------------------------------------------------------------------------------------------- */

typedef struct operand {
    stv_stored values; /* a: of the kernel's type */
    bool transposed;   /* a: (K,M) in place of (M,K); b: (N,K) in place of (K,N) */
} operand;

typedef struct product {
    const stv_gemm_kernel *kernel;
    char *y;
    operand a, b;
    int64_t M, N, K;
    bool add;
    int64_t n_m_blocks, n_n_blocks; /* blocks of y */
    int64_t part_cols;              /* columns of a block that share panels of b */
    char *scratch;                  /* (n workers) x (packed rows of a, panels of b) */
    size_t a_bytes, worker_bytes;
} product;

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static int64_t count_parts(const product *p, int64_t columns) { return ceil_div(columns, p->part_cols); }

/* Strips of equal height and panels of equal width, because a tile of few rows or one vector does not keep the FMA units busy. */
typedef struct piece {
    int64_t begin, count;
} piece;

/* Piece i of n of [begin,end), cut at multiples of `unit` from begin. */
static piece get_piece(int64_t begin, int64_t end, int64_t i, int64_t n, int64_t unit)
{
    int64_t n_units = ceil_div(end - begin, unit), from = begin + n_units * i / n * unit;
    return (piece){from, min64(begin + n_units * (i + 1) / n * unit, end) - from};
}

static bool is_wide(const product *p) { return p->b.values.dtype == p->kernel->dtype; }

/* panel (depth, n_cols) = some columns of b, rows k0..; beyond them zero, as far as a tile reads. */
static void pack_b(const product *p, char *panel, piece cols, int64_t k0, int64_t depth)
{
    int64_t size = p->kernel->size_bytes, width = p->kernel->n_cols;
    if (cols.count % p->kernel->n_lanes) memset(panel, 0, (size_t)(depth * width * size));
    if (p->b.transposed) p->kernel->transpose(panel, width, stv_stored_from(p->b.values, cols.begin * p->K + k0), p->K, cols.count, depth);
    else p->kernel->copy(panel, width, stv_stored_from(p->b.values, k0 * p->N + cols.begin), p->N, depth, cols.count);
}

/* packed (n, n_rows, A_STRIDE): several strips, so that a transposed a is read in whole cache lines, each once. */
static void pack_a(const product *p, char *packed, const piece *strips, int n, int64_t k0, int64_t depth)
{
    int64_t size = p->kernel->size_bytes, strip_bytes = p->kernel->n_rows * A_STRIDE * size;
    if (p->a.transposed) {
        for (int64_t k = 0; k < depth; k += 8)
            for (int i = 0; i < n; i++)
                p->kernel->transpose(packed + i * strip_bytes + k * size, A_STRIDE, stv_stored_from(p->a.values, (k0 + k) * p->M + strips[i].begin),
                                     p->M, min64(8, depth - k), strips[i].count);
        return;
    }
    for (int i = 0; i < n; i++)
        p->kernel->copy(packed + i * strip_bytes, A_STRIDE, stv_stored_from(p->a.values, strips[i].begin * p->K + k0), p->K, strips[i].count, depth);
}

/* Where a tile finds its part of an operand. */
typedef struct source {
    const void *data;
    int64_t stride;
} source;

/* One K block of y[rows, columns]. The strips of a are packed if `pack`, all of them side by side if `keep`, else a group at a time. */
static void compute_part(const product *p, char *scratch, piece rows, piece columns, piece k, bool pack, bool keep)
{
    const stv_gemm_kernel *kernel = p->kernel;
    int64_t size = kernel->size_bytes, width = kernel->n_cols, lanes = kernel->n_lanes, end = columns.begin + columns.count;
    int64_t n_strips = ceil_div(rows.count, kernel->n_rows), n_panels = ceil_div(columns.count, width);
    int64_t strip_bytes = kernel->n_rows * A_STRIDE * size, panel_bytes = k.count * width * size;
    char *panels = scratch + p->a_bytes;
    bool add = p->add || k.begin > 0;
    piece cols[MAX_PANELS];
    for (int64_t i = 0; i < n_panels; i++) cols[i] = get_piece(columns.begin, end, i, n_panels, lanes);
    /* What is used once or twice, and lies the right way, is read where it is. */
    bool a_in_place = !p->a.transposed && !keep && n_panels <= A_IN_PLACE;
    bool b_in_place = !p->b.transposed && is_wide(p) && (n_strips <= B_IN_PLACE || p->K * p->N * size <= SMALL_B) && columns.count % lanes == 0;

    for (int64_t i = 0; i < n_panels && !b_in_place; i++) pack_b(p, panels + i * panel_bytes, cols[i], k.begin, k.count);
    for (int64_t i_strip = 0; i_strip < n_strips; i_strip += GROUP) {
        int n = (int)min64(GROUP, n_strips - i_strip);
        char *packed = scratch + (keep ? i_strip * strip_bytes : 0);
        piece strips[GROUP];
        for (int i = 0; i < n; i++) strips[i] = get_piece(rows.begin, rows.begin + rows.count, i_strip + i, n_strips, 1);
        if (pack && !a_in_place) pack_a(p, packed, strips, n, k.begin, k.count);
        for (int i = 0; i < n; i++) {
            source a = a_in_place ? (source){stv_stored_from(p->a.values, strips[i].begin * p->K + k.begin).data, p->K}
                                  : (source){packed + i * strip_bytes, A_STRIDE};
            for (int64_t j = 0; j < n_panels; j++) {
                source b = b_in_place ? (source){stv_stored_from(p->b.values, k.begin * p->N + cols[j].begin).data, p->N}
                                      : (source){panels + j * panel_bytes, width};
                kernel->tile(p->y + (strips[i].begin * p->N + cols[j].begin) * size, p->N, a.data, a.stride, b.data, b.stride,
                             (stv_gemm_extent){strips[i].count, cols[j].count, k.count}, add);
            }
        }
    }
}

/* One row of y and a weight (N,K), as in a decoding step: nothing is packed. b's rows are read from end to end, some at a time, which memory likes.
 * N = K = 4096 on an Ice Lake core: f32 8.0 -> 5.2 ms, bf16 and f16 8.2 -> 2.8 and 3.2: 12 GB/s. */
static void compute_row(const product *p, piece columns)
{
    int64_t size = p->kernel->size_bytes, end = columns.begin + columns.count;
    for (int64_t j = columns.begin; j < end && !stv_stopped(); j += ROW_COLUMNS)
        for (int64_t k = 0; k < p->K; k += STV_GEMM_K_BLOCK)
            p->kernel->row(p->y + j * size, stv_stored_from(p->a.values, k).data, stv_stored_from(p->b.values, j * p->K + k), p->K,
                           min64(ROW_COLUMNS, end - j), min64(STV_GEMM_K_BLOCK, p->K - k), p->add || k > 0);
}

/* One strip of rows: the same order for the same reason. */
static void compute_strip(const product *p, char *scratch, piece rows, piece columns)
{
    int64_t n_parts = count_parts(p, columns.count);
    for (int64_t i = 0; i < n_parts && !stv_stopped(); i++)
        for (int64_t k = 0; k < p->K; k += STV_GEMM_K_BLOCK)
            compute_part(p, scratch, rows, get_piece(columns.begin, columns.begin + columns.count, i, n_parts, p->kernel->n_cols),
                         (piece){k, min64(STV_GEMM_K_BLOCK, p->K - k)}, true, false);
}

static void compute_strips(const product *p, char *scratch, piece rows, piece columns)
{
    int64_t n_parts = count_parts(p, columns.count);
    for (int64_t k = 0; k < p->K; k += STV_GEMM_K_BLOCK)
        for (int64_t i = 0; i < n_parts && !stv_stopped(); i++)
            compute_part(p, scratch, rows, get_piece(columns.begin, columns.begin + columns.count, i, n_parts, p->kernel->n_cols),
                         (piece){k, min64(STV_GEMM_K_BLOCK, p->K - k)}, i == 0, n_parts > 1);
}

static void compute_block(void *arg, int64_t i_task, int i_worker)
{
    const product *p = arg;
    char *scratch = p->scratch + (size_t)i_worker * p->worker_bytes;
    piece rows = get_piece(0, p->M, i_task / p->n_n_blocks, p->n_m_blocks, 1);
    piece columns = get_piece(0, p->N, i_task % p->n_n_blocks, p->n_n_blocks, p->kernel->n_cols);
    if (p->kernel->row && p->M == 1 && p->N >= 8 && p->K >= 16 && p->b.transposed) compute_row(p, columns);
    else if (p->M <= p->kernel->n_rows && p->b.transposed) compute_strip(p, scratch, rows, columns);
    else compute_strips(p, scratch, rows, columns);
}

/* How y is cut decides the speed only. Columns first: cutting rows makes every row block pack b again. One block for each thread: with two, a is
 * packed more often, and a training step on two threads took 17 % more CPU time than on one; now 6 %. */
static void plan_blocks(product *p, int n_threads)
{
    const stv_gemm_kernel *kernel = p->kernel;
    int64_t n_blocks = n_threads, n_units = ceil_div(p->N, kernel->n_cols);
    if (2.0 * (double)p->M * (double)p->N * (double)p->K < SMALL_FLOP) n_blocks = 1;
    p->part_cols = p->M <= kernel->n_rows ? kernel->n_cols : B_BLOCK_BYTES / kernel->size_bytes;
    p->n_n_blocks = min64(ceil_div(p->N, p->part_cols), n_blocks);
    p->n_m_blocks = max64(min64(ceil_div(n_blocks, p->n_n_blocks), p->M / (4 * kernel->n_rows)), ceil_div(p->M, MAX_ROWS));
    if (p->n_m_blocks * p->n_n_blocks < n_blocks) p->n_n_blocks = max64(min64(ceil_div(n_blocks, p->n_m_blocks), n_units), p->n_n_blocks);
}

static void multiply(stv_exec *x, const stv_gemm_kernel *kernel, void *y, operand a, operand b, int64_t M, int64_t N, int64_t K, bool add)
{
    product p = {.kernel = kernel, .y = y, .a = a, .b = b, .M = M, .N = N, .K = K, .add = add};
    int n_threads = stv_pool_n_threads(x->pool);
    plan_blocks(&p, n_threads);
    int64_t n_tasks = p.n_m_blocks * p.n_n_blocks, size = kernel->size_bytes;
    int64_t n_units = ceil_div(ceil_div(N, kernel->n_cols), p.n_n_blocks), n_parts = count_parts(&p, n_units * kernel->n_cols);
    int64_t n_strips = n_parts > 1 ? ceil_div(ceil_div(M, p.n_m_blocks), kernel->n_rows) : GROUP;
    p.a_bytes = (size_t)(n_strips * kernel->n_rows * A_STRIDE * size);
    int64_t part_units = min64(n_units, ceil_div(p.part_cols, kernel->n_cols));
    p.worker_bytes = p.a_bytes + (size_t)(part_units * kernel->n_cols * min64(K, STV_GEMM_K_BLOCK) * size);

    size_t mark = stv_arena_mark(x->arena);
    p.scratch = stv_arena_alloc(x->arena, (n_tasks > 1 ? (size_t)n_threads : 1) * p.worker_bytes);
    if (!stv_measuring(x)) {
        if (K > 0) stv_pool_run(x->pool, n_tasks, compute_block, &p);
        else if (!add) memset(y, 0, (size_t)(M * N * size));
    }
    stv_arena_release(x->arena, mark);
}

/* dst (cols,rows) = src (rows,cols)^T */
static void turn(const stv_gemm_kernel *kernel, char *dst, const char *src, int64_t rows, int64_t cols)
{
    int64_t size = kernel->size_bytes;
    if (rows % 8 == 0) {
        kernel->transpose(dst, rows, (stv_stored){src, kernel->dtype}, cols, rows, cols);
        return;
    }
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) memcpy(dst + (j * rows + i) * size, src + (i * cols + j) * size, (size_t)size);
}

static operand flipped(operand o) { return (operand){o.values, !o.transposed}; }

/* A narrow y leaves most of a vector, and most FMAs of a broadcast, unused: its transpose is computed instead, from the operands as they lie. */
static void multiply_narrow(stv_exec *x, const stv_gemm_kernel *kernel, void *y, operand a, operand b, int64_t M, int64_t N, int64_t K, bool add)
{
    size_t mark = stv_arena_mark(x->arena);
    char *t = stv_arena_alloc(x->arena, (size_t)(M * N * kernel->size_bytes));
    if (add && !stv_measuring(x)) turn(kernel, t, y, M, N);
    multiply(x, kernel, t, flipped(b), flipped(a), N, M, K, add);
    if (!stv_measuring(x)) turn(kernel, y, t, N, M);
    stv_arena_release(x->arena, mark);
}

static void choose(stv_exec *x, stv_dtype dtype, void *y, operand a, operand b, int64_t M, int64_t N, int64_t K, bool add)
{
    const stv_gemm_kernel *kernel = choose_kernel(dtype);
    if (M <= 0 || N <= 0) return;
    if (N <= kernel->n_lanes && M >= kernel->n_cols && b.values.dtype == dtype) multiply_narrow(x, kernel, y, a, b, M, N, K, add);
    else multiply(x, kernel, y, a, b, M, N, K, add);
}

/* ---- the products ---------------------------------------------------------------------------------------------------- */

static stv_stored floats(const float *data) { return (stv_stored){data, STV_DTYPE_F32}; }

static stv_stored doubles(const double *data) { return (stv_stored){data, STV_DTYPE_F64}; }

static operand as_is(stv_stored values) { return (operand){values, false}; }

static operand transposed(stv_stored values) { return (operand){values, true}; }

void stv_matmul_nt_f32(stv_exec *x, float *y, const float *a, const float *w, int64_t M, int64_t N, int64_t K, bool add)
{
    stv_matmul_nt_stored_f32(x, y, a, floats(w), M, N, K, add);
}

void stv_matmul_nt_f64(stv_exec *x, double *y, const double *a, const double *w, int64_t M, int64_t N, int64_t K, bool add)
{
    stv_matmul_nt_stored_f64(x, y, a, doubles(w), M, N, K, add);
}

void stv_matmul_nn_f32(stv_exec *x, float *y, const float *a, const float *b, int64_t M, int64_t N, int64_t K, bool add)
{
    stv_matmul_nn_stored_f32(x, y, a, floats(b), M, N, K, add);
}

void stv_matmul_nn_f64(stv_exec *x, double *y, const double *a, const double *b, int64_t M, int64_t N, int64_t K, bool add)
{
    stv_matmul_nn_stored_f64(x, y, a, doubles(b), M, N, K, add);
}

void stv_matmul_tn_f32(stv_exec *x, float *y, const float *a, const float *b, int64_t M, int64_t N, int64_t K, bool add)
{
    if (stv_gemm_blas_tn_f32(x, y, a, b, M, N, K, add)) return;
    choose(x, STV_DTYPE_F32, y, transposed(floats(a)), as_is(floats(b)), M, N, K, add);
}

void stv_matmul_tn_f64(stv_exec *x, double *y, const double *a, const double *b, int64_t M, int64_t N, int64_t K, bool add)
{
    choose(x, STV_DTYPE_F64, y, transposed(doubles(a)), as_is(doubles(b)), M, N, K, add);
}

void stv_matmul_nt_stored_f32(stv_exec *x, float *y, const float *a, stv_stored w, int64_t M, int64_t N, int64_t K, bool add)
{
    choose(x, STV_DTYPE_F32, y, as_is(floats(a)), transposed(w), M, N, K, add);
}

void stv_matmul_nt_stored_f64(stv_exec *x, double *y, const double *a, stv_stored w, int64_t M, int64_t N, int64_t K, bool add)
{
    choose(x, STV_DTYPE_F64, y, as_is(doubles(a)), transposed(w), M, N, K, add);
}

void stv_matmul_nn_stored_f32(stv_exec *x, float *y, const float *a, stv_stored b, int64_t M, int64_t N, int64_t K, bool add)
{
    choose(x, STV_DTYPE_F32, y, as_is(floats(a)), as_is(b), M, N, K, add);
}

void stv_matmul_nn_stored_f64(stv_exec *x, double *y, const double *a, stv_stored b, int64_t M, int64_t N, int64_t K, bool add)
{
    choose(x, STV_DTYPE_F64, y, as_is(doubles(a)), as_is(b), M, N, K, add);
}
