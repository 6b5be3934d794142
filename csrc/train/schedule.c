/* schedule.c - the learning rate's multiplier, as transformers computes it. */
#include "stllava.h"

#include <math.h>

double stv_schedule(stv_schedule_kind kind, int64_t step, int64_t warmup, int64_t total, double floor)
{
    if (step < warmup) return (double)step / (double)(warmup > 1 ? warmup : 1);
    if (kind == STV_SCHEDULE_CONSTANT) return 1;
    if (step >= total) return floor;
    double progress = (double)(step - warmup) / (double)(total - warmup);
    double curve = kind == STV_SCHEDULE_LINEAR ? 1 - progress : 0.5 * (1 + cos(acos(-1.0) * progress));
    return floor + (1 - floor) * curve;
}
