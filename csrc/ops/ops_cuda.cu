#include "ops/ops_cuda.h"

const stv_ops_cuda *stv_ops_cuda_table(void)
{
    static const stv_ops_cuda table = {
        stv_rmsnorm_forward_cuda,
        stv_rmsnorm_backward_add_cuda,
    };
    return &table;
}
