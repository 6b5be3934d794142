#include "ops/gemm_blas.h"

#include "base/cpu.h"

#ifdef STV_HAVE_BLAS

#ifdef STV_BLAS_BUNDLED /* the scipy-openblas32 wheel prefixes its symbols */
#define cblas_sgemm scipy_cblas_sgemm
#endif

/* The one routine used, declared here so that no header is needed where the library is installed. Source: the CBLAS standard. */
extern void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda, const float *b, int ldb,
                        float beta, float *c, int ldc);
enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };

#define BLOCK_ROWS 256
#define SMALLEST ((int64_t)2048 * 2048) /* elements of y; below, our own kernel is as fast */

typedef struct product {
    float *y;
    const float *a, *b;
    int64_t M, N, K;
    float beta;
} product;

static void compute_rows(void *arg, int64_t i_task, int i_worker)
{
    (void)i_worker;
    const product *p = arg;
    int64_t begin = i_task * BLOCK_ROWS, rows = p->M - begin < BLOCK_ROWS ? p->M - begin : BLOCK_ROWS;
    cblas_sgemm(ROW_MAJOR, TRANS, NO_TRANS, (int)rows, (int)p->N, (int)p->K, 1, p->a + begin, (int)p->M, p->b, (int)p->N, p->beta,
                p->y + begin * p->N, (int)p->N);
}

bool stv_gemm_blas_tn_f32(stv_exec *x, float *y, const float *a, const float *b, int64_t M, int64_t N, int64_t K, bool add)
{
    if (stv_cpu() == STV_CPU_AVX512 || M * N < SMALLEST || K < 1 || M > INT32_MAX || N > INT32_MAX || K > INT32_MAX) return false;
    product p = {y, a, b, M, N, K, add ? 1 : 0};
    if (!stv_measuring(x)) stv_pool_run(x->pool, (M + BLOCK_ROWS - 1) / BLOCK_ROWS, compute_rows, &p);
    return true;
}

const char *stv_gemm_blas_name(void)
{
#ifdef STV_BLAS_BUNDLED
    return "openblas (bundled)";
#else
    return "openblas (system)";
#endif
}

#else

bool stv_gemm_blas_tn_f32(stv_exec *x, float *y, const float *a, const float *b, int64_t M, int64_t N, int64_t K, bool add)
{
    (void)x, (void)y, (void)a, (void)b, (void)M, (void)N, (void)K, (void)add;
    return false;
}

const char *stv_gemm_blas_name(void) { return "none"; }

#endif
