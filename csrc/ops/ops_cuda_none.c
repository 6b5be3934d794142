#include "ops/ops_cuda.h"

#include <stddef.h>

const stv_ops_cuda *stv_ops_cuda_table(void) { return NULL; }
