/* cpu.h - what this processor can do, asked once. STLLAVA_CPU=portable|avx2|avx512 in the environment lowers (never raises) the answer. */
#ifndef STV_BASE_CPU_H
#define STV_BASE_CPU_H

typedef enum stv_cpu_level { STV_CPU_PORTABLE = 0, STV_CPU_AVX2 = 1, STV_CPU_AVX512 = 2 } stv_cpu_level;

stv_cpu_level stv_cpu(void);
const char *stv_cpu_level_name(stv_cpu_level level); /* "portable", "avx2", "avx512" */

#endif
