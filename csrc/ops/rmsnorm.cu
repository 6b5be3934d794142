/* rmsnorm.cu - a block per row; dweight by blocks of 32 columns.
 *
 * Sums are in double as on the CPU, in another but equally fixed order: no atomics, so the same bits on every run. A block walks rows with a grid
 * stride, because a grid has fewer blocks than a batch may have rows. */
#include "ops/ops_cuda.h"

static const int row_threads = 256, max_blocks = 65535;
static const int columns = 32, row_lanes = 8; /* the block of a column sum */

/* Sum over the block; every thread gets it. */
static __device__ double block_sum(double sum)
{
    __shared__ double warp_sums[row_threads / 32];
    __shared__ double total;
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xFFFFFFFFu, sum, offset);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        total = 0;
        for (int w = 0; w < row_threads / 32; w++) total += warp_sums[w];
    }
    __syncthreads();
    return total;
}

static stv_status launched(const char *name, int64_t rows, int64_t D)
{
    cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess) return STV_OK;
    return stv_fail(STV_ERR_DEVICE, "%s (%lld,%lld): %s", name, (long long)rows, (long long)D, cudaGetErrorString(error));
}

static unsigned n_row_blocks(int64_t rows) { return (unsigned)(rows < max_blocks ? rows : max_blocks); }

static __global__ void forward_rows(float *y, float *rstd_out, const float *in, const float *weight, int64_t rows, int64_t D, double eps)
{
    for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
        const float *x = in + r * D;
        double sum = 0;
        for (int64_t i = threadIdx.x; i < D; i += row_threads) sum += (double)x[i] * (double)x[i];
        float rstd = (float)(1 / sqrt(block_sum(sum) / (double)D + eps));
        for (int64_t i = threadIdx.x; i < D; i += row_threads) y[r * D + i] = weight[i] * (x[i] * rstd);
        if (threadIdx.x == 0) rstd_out[r] = rstd;
    }
}

stv_status stv_rmsnorm_forward_cuda(void *stream, float *y, float *rstd, const float *in, const float *weight, int64_t rows, int64_t D, double eps)
{
    if (rows == 0) return STV_OK;
    forward_rows<<<n_row_blocks(rows), row_threads, 0, (cudaStream_t)stream>>>(y, rstd, in, weight, rows, D, eps);
    return launched("rmsnorm_forward", rows, D);
}

static __global__ void backward_rows(float *din, const float *dy, const float *in, const float *weight, const float *rstd_in, int64_t rows, int64_t D)
{
    for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
        const float *x = in + r * D, *g = dy + r * D;
        float rstd = rstd_in[r];
        double sum = 0;
        for (int64_t i = threadIdx.x; i < D; i += row_threads) sum += (double)g[i] * (double)weight[i] * (double)x[i];
        float along = (float)(block_sum(sum) * (double)rstd / (double)D * (double)rstd);
        for (int64_t i = threadIdx.x; i < D; i += row_threads) din[r * D + i] += rstd * (g[i] * weight[i] - x[i] * along);
    }
}

/* Thread (column, lane) sums every row_lanes-th row; lanes are then added in order. */
static __global__ void backward_columns(float *dweight, const float *dy, const float *in, const float *rstd, int64_t rows, int64_t D)
{
    __shared__ double lane_sums[row_lanes][columns];
    int64_t column = (int64_t)blockIdx.x * columns + threadIdx.x;
    double sum = 0;
    if (column < D)
        for (int64_t r = threadIdx.y; r < rows; r += row_lanes) sum += (double)dy[r * D + column] * ((double)in[r * D + column] * (double)rstd[r]);
    lane_sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || column >= D) return;
    for (int lane = 1; lane < row_lanes; lane++) sum += lane_sums[lane][threadIdx.x];
    dweight[column] += (float)sum;
}

stv_status stv_rmsnorm_backward_add_cuda(void *stream, float *din, float *dweight, const float *dy, const float *in, const float *weight,
                                         const float *rstd, int64_t rows, int64_t D)
{
    if (rows == 0) return STV_OK;
    if (dweight) {
        dim3 block(columns, row_lanes);
        backward_columns<<<(unsigned)((D + columns - 1) / columns), block, 0, (cudaStream_t)stream>>>(dweight, dy, in, rstd, rows, D);
        stv_status status = launched("rmsnorm_backward (dweight)", rows, D);
        if (status != STV_OK) return status;
    }
    backward_rows<<<n_row_blocks(rows), row_threads, 0, (cudaStream_t)stream>>>(din, dy, in, weight, rstd, rows, D);
    return launched("rmsnorm_backward", rows, D);
}
