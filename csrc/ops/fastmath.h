/* fastmath.h - private to ops: an exponential that the compiler can vectorise.
 *
 * libm's expf is a call per element. exp_real of an f32 build is a dozen plain operations without branches: x = n ln2 + r with |r| <= ln2/2,
 * exp(r) by a polynomial, 2^n by two scalings (so that subnormal and infinite results come out right). Within 1 ulp of the true value, the same
 * bits at every vector width; NaN stays NaN. An f64 build is the exact check and uses libm. */
#ifndef STV_OPS_FASTMATH_H
#define STV_OPS_FASTMATH_H

#include "tensor/real.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

/* On a function with exponentials in its loop: compiled for three vector widths, chosen by the loader; 2.3 -> 0.6 ns per SwiGLU element. All
 * clones give the same bits, since nothing is contracted (-ffp-contract=off), so STLLAVA_CPU need not reach them. ThreadSanitizer does not
 * survive the loader's choice, and musl has none. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define STV_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define STV_CLONES
#endif

#if STV_REAL_BITS == 32

static inline float power_of_two(int32_t n) /* n in [-126, 127] */
{
    uint32_t bits = ((uint32_t)n + 127u) << 23;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* c ? a : b by masks: gcc would thread the constant through a branch and then not vectorise the loop around it. */
static inline float select_real(bool c, float a, float b)
{
    uint32_t bits_a, bits_b, mask = -(uint32_t)c;
    memcpy(&bits_a, &a, sizeof a);
    memcpy(&bits_b, &b, sizeof b);
    bits_b = (bits_a & mask) | (bits_b & ~mask);
    memcpy(&b, &bits_b, sizeof b);
    return b;
}

static inline real exp_real(real x)
{
    /* Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits. */
    const float round = 0x1.8p+23f, log2_e = 0x1.715476p+0f;
    const float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f; /* n * ln2_high is exact */
    x = select_real(x < -105.0f, -105.0f, x);                       /* below: 0; above: infinity */
    x = select_real(x > 90.0f, 90.0f, x);
    float shifted = x * log2_e + round, n = shifted - round;
    float r = (x - n * ln2_high) - n * ln2_low;
    /* exp(r) = 1 + r + r^2 q(r); q by a minimax fit of the relative error, 3e-9. */
    float q = 0x1.6a23d0p-10f;
    q = q * r + 0x1.123a20p-7f;
    q = q * r + 0x1.5558f2p-5f;
    q = q * r + 0x1.555492p-3f;
    q = q * r + 0x1.fffffcp-2f;
    float y = 1.0f + (r + r * r * q);
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    int32_t whole = (int32_t)(bits - 0x4B400000u), half = whole >> 1;
    return y * power_of_two(half) * power_of_two(whole - half);
}

#else

static inline real exp_real(real x) { return exp(x); }

#endif

static inline real sigmoid(real x) { return 1 / (1 + exp_real(-x)); }

#endif
