#include "base/cpu.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

static const char *const names[] = {"portable", "avx2", "avx512"};

#if defined(__x86_64__)
/* Not every compiler's __builtin_cpu_supports knows the name. */
static bool has_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

static stv_cpu_level detect(void)
{
    stv_cpu_level level = STV_CPU_PORTABLE;
#if defined(__x86_64__)
    /* The builtin also asks whether the operating system saves the wide registers. */
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) level = STV_CPU_AVX2;
    if (level == STV_CPU_AVX2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        level = STV_CPU_AVX512;
#endif
    const char *wish = getenv("STLLAVA_CPU");
    for (int i = 0; wish && i < (int)level; i++)
        if (strcmp(wish, names[i]) == 0) level = (stv_cpu_level)i;
    return level;
}

stv_cpu_level stv_cpu(void)
{
    /* One more than the level; 0 = not asked yet. Two threads that ask at once store the same answer. */
    static atomic_int known;
    int level = atomic_load_explicit(&known, memory_order_relaxed);
    if (!level) {
        level = (int)detect() + 1;
        atomic_store_explicit(&known, level, memory_order_relaxed);
    }
    return (stv_cpu_level)(level - 1);
}

const char *stv_cpu_level_name(stv_cpu_level level) { return names[level]; }
