/* dropout.c - where a mask bit comes from:
 *
 *   key                    = seed, STV_RNG_DROPOUT
 *   r[0..3]                = Philox(counter = sample, step; key)               once a row; a bijection, so two (sample, step) never share it
 *   draws of columns 4c..  = Philox(counter = c, position, module, r[0]; key = r[1], r[2])
 *
 * All of a place fits into neither one counter nor one key; this way two places share draws only if 96 bits of r agree by chance. */
#include "ops/dropout.h"

#include "base/rng.h"
#include "ops/split.h"

#include <string.h>

enum { ROW_GRAIN = 16 };

typedef struct dropout_job {
    real *y;
    const real *in;
    int64_t rows, n;
    uint32_t threshold; /* a 32-bit draw below it drops */
    real scale;
    uint32_t key[2], module_id;
    const stv_dropout *drop;
} dropout_job;

static void drop_row(const dropout_job *job, int64_t row)
{
    uint64_t sample = job->drop->row_sample[row], step = job->drop->step;
    uint32_t r[4];
    stv_philox(r, (const uint32_t[4]){(uint32_t)sample, (uint32_t)(sample >> 32), (uint32_t)step, (uint32_t)(step >> 32)}, job->key[0], job->key[1]);
    uint32_t counter[4] = {0, (uint32_t)job->drop->row_position[row], job->module_id, r[0]};
    real *y = job->y + row * job->n;
    const real *in = job->in + row * job->n;
    const real factor[2] = {0, job->scale}; /* looked up: a branch on a random bit is guessed wrong */
    for (int64_t col = 0; col < job->n; col += 4) {
        uint32_t draws[4];
        counter[0] = (uint32_t)(col / 4);
        stv_philox(draws, counter, r[1], r[2]);
        int64_t count = job->n - col < 4 ? job->n - col : 4;
        for (int64_t j = 0; j < count; j++) y[col + j] = in[col + j] * factor[draws[j] >= job->threshold];
    }
}

static void drop_rows(const void *arg, int64_t begin, int64_t end)
{
    for (int64_t row = begin; row < end; row++) drop_row(arg, row);
}

void stv_dropout_apply(stv_exec *x, real *y, const real *in, int64_t rows, int64_t n, float p, uint32_t module_id, const stv_dropout *drop)
{
    if (stv_measuring(x)) return;
    if (!drop || p <= 0) {
        if (y != in) memcpy(y, in, (size_t)(rows * n) * sizeof *y);
        return;
    }
    dropout_job job = {.y = y, .in = in, .rows = rows, .n = n, .module_id = module_id, .drop = drop};
    job.threshold = (uint32_t)((double)p * 0x1p32);
    job.scale = (real)(1 / (1 - (double)p));
    stv_rng_key(job.key, drop->seed, STV_RNG_DROPOUT);
    stv_split(x, rows, ROW_GRAIN, drop_rows, &job);
}
