/* test_rmsnorm.cu - the CUDA kernels against the f32 CPU operator. Built with the CUDA switch; needs a device:
 *
 *     nvcc -arch=sm_90 -Icsrc -DSTV_REAL_BITS=32 tests/cuda/test_rmsnorm.cu csrc/ops/ops_cuda.cu csrc/ops/rmsnorm.cu <CPU objects of the core> */
#include "ops/ops_cuda.h"

extern "C" {
#include "base/exec.h"
#include "ops/rmsnorm.h"
}

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

static int n_failed;

static void check(bool ok, const char *what, int64_t rows, int64_t D, double error)
{
    std::printf("%s %s (%lld,%lld): %.3g\n", ok ? "ok    " : "FAILED", what, (long long)rows, (long long)D, error);
    n_failed += !ok;
}

static bool fine(cudaError_t error, const char *what)
{
    if (error == cudaSuccess) return true;
    std::printf("FAILED %s: %s\n", what, cudaGetErrorString(error));
    n_failed++;
    return false;
}

/* Uniform in [-1,1) from a linear congruence. */
static std::vector<float> random_floats(int64_t n, uint64_t seed)
{
    std::vector<float> v(n);
    for (auto &x : v) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        x = (float)(seed >> 40) / 8388608.0f - 1.0f;
    }
    return v;
}

/* A device buffer that is its host vector; n = 0 is allowed. */
struct mirror {
    float *device = nullptr;
    size_t size_bytes;
    explicit mirror(const std::vector<float> &host) : size_bytes(host.size() * sizeof(float))
    {
        if (fine(cudaMalloc(&device, size_bytes + 4), "cudaMalloc")) fine(cudaMemcpy(device, host.data(), size_bytes, cudaMemcpyHostToDevice), "copy in");
    }
    ~mirror() { cudaFree(device); }
    std::vector<float> get() const
    {
        std::vector<float> host(size_bytes / sizeof(float));
        fine(cudaMemcpy(host.data(), device, size_bytes, cudaMemcpyDeviceToHost), "copy out");
        return host;
    }
};

static double worst(const std::vector<float> &got, const std::vector<float> &want)
{
    double scale = 0, error = 0;
    for (size_t i = 0; i < want.size(); i++) scale = std::fmax(scale, std::fabs((double)want[i]));
    for (size_t i = 0; i < want.size(); i++) {
        double e = std::fabs((double)got[i] - (double)want[i]);
        if (!(e <= error)) error = e;
    }
    return scale > 0 ? error / scale : error;
}

static void compare(stv_exec *x, const stv_ops_cuda *ops, cudaStream_t stream, int64_t rows, int64_t D)
{
    const double eps = 1e-5, tolerance = 1e-6; /* sums agree to 1e-15, so a few roundings of 6e-8 */
    auto in = random_floats(rows * D, 1), weight = random_floats(D, 2), dy = random_floats(rows * D, 3);
    auto din = random_floats(rows * D, 4), dweight = random_floats(D, 5);
    std::vector<float> y(rows * D), rstd(rows);
    mirror m_in(in), m_weight(weight), m_dy(dy), m_din(din), m_dweight(dweight), m_y(y), m_rstd(rstd);

    stv_rmsnorm_forward(x, y.data(), rstd.data(), in.data(), stv_stored_reals(weight.data()), rows, D, eps);
    stv_rmsnorm_backward_add(x, din.data(), dweight.data(), dy.data(), in.data(), stv_stored_reals(weight.data()), rstd.data(), rows, D);

    if (ops->rmsnorm_forward(stream, m_y.device, m_rstd.device, m_in.device, m_weight.device, rows, D, eps) != STV_OK ||
        ops->rmsnorm_backward_add(stream, m_din.device, m_dweight.device, m_dy.device, m_in.device, m_weight.device, m_rstd.device, rows, D) != STV_OK) {
        std::printf("FAILED %s\n", stv_last_error());
        n_failed++;
        return;
    }
    if (!fine(cudaStreamSynchronize(stream), "synchronize")) return;
    double error = worst(m_y.get(), y);
    check(error <= tolerance, "y", rows, D, error);
    error = worst(m_rstd.get(), rstd);
    check(error <= tolerance, "rstd", rows, D, error);
    error = worst(m_din.get(), din);
    check(error <= tolerance, "din", rows, D, error);
    error = worst(m_dweight.get(), dweight);
    check(error <= tolerance, "dweight", rows, D, error);
}

int main()
{
    const stv_ops_cuda *ops = stv_ops_cuda_table();
    int n_devices = 0;
    if (!ops || cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0) {
        std::printf("skipped: no CUDA device\n");
        return 0;
    }
    stv_pool *pool;
    stv_arena arena;
    cudaStream_t stream;
    if (stv_pool_create(&pool, 0) != STV_OK || stv_arena_create(&arena, 64) != STV_OK || !fine(cudaStreamCreate(&stream), "cudaStreamCreate")) return 1;
    stv_exec x = {pool, &arena};
    const int64_t shapes[][2] = {{1, 1}, {3, 7}, {5, 255}, {2, 4096}, {577, 1024}, {70001, 5}, {0, 16}};
    for (auto &shape : shapes) compare(&x, ops, stream, shape[0], shape[1]);
    cudaStreamDestroy(stream);
    stv_arena_free(&arena);
    stv_pool_free(pool);
    return n_failed != 0;
}
