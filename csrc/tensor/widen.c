#include "tensor/widen.h"

#include "base/cpu.h"
#include "base/target.h"

#include <string.h>

typedef void widen_body(float *out, const uint16_t *in, int64_t n);

static inline void widen_each_bf16(float *out, const uint16_t *in, int64_t n)
{
    for (int64_t i = 0; i < n; i++) out[i] = stv_widen_bf16(in[i]);
}

static void bf16_portable(float *out, const uint16_t *in, int64_t n) { widen_each_bf16(out, in, n); }

static void f16_portable(float *out, const uint16_t *in, int64_t n)
{
    for (int64_t i = 0; i < n; i++) out[i] = stv_widen_f16(in[i]);
}

#if defined(__x86_64__)
#include <immintrin.h>

STV_TARGET_BEGIN("avx2,f16c")
static void bf16_avx2(float *out, const uint16_t *in, int64_t n) { widen_each_bf16(out, in, n); }

static void f16_avx2(float *out, const uint16_t *in, int64_t n)
{
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(in + i))));
    for (; i < n; i++) out[i] = stv_widen_f16(in[i]);
}
STV_TARGET_END

STV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl")
static void bf16_avx512(float *out, const uint16_t *in, int64_t n) { widen_each_bf16(out, in, n); }

static void f16_avx512(float *out, const uint16_t *in, int64_t n)
{
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(in + i))));
    for (; i < n; i++) out[i] = stv_widen_f16(in[i]);
}
STV_TARGET_END
#endif

static void widen_half(float *out, stv_stored from, int64_t n)
{
#if defined(__x86_64__)
    static widen_body *const table[3][2] = {
        [STV_CPU_PORTABLE] = {f16_portable, bf16_portable},
        [STV_CPU_AVX2] = {f16_avx2, bf16_avx2},
        [STV_CPU_AVX512] = {f16_avx512, bf16_avx512},
    };
    table[stv_cpu()][from.dtype == STV_DTYPE_BF16](out, from.data, n);
#else
    (from.dtype == STV_DTYPE_BF16 ? bf16_portable : f16_portable)(out, from.data, n);
#endif
}

void stv_widen_f32(float *out, stv_stored from, int64_t n)
{
    if (from.dtype == STV_DTYPE_F32) memcpy(out, from.data, (size_t)n * sizeof *out);
    else widen_half(out, from, n);
}

void stv_widen_f64(double *out, stv_stored from, int64_t n)
{
    enum { CHUNK = 256 };
    float chunk[CHUNK];
    if (from.dtype == STV_DTYPE_F64) {
        memcpy(out, from.data, (size_t)n * sizeof *out);
        return;
    }
    for (int64_t i = 0; i < n; i += CHUNK) {
        int64_t count = n - i < CHUNK ? n - i : CHUNK;
        stv_widen_f32(chunk, stv_stored_from(from, i), count);
        for (int64_t j = 0; j < count; j++) out[i + j] = (double)chunk[j];
    }
}
