#include "base/rng.h"

void stv_philox(uint32_t out[4], const uint32_t counter[4], uint32_t key0, uint32_t key1)
{
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ key0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ key1;
        c3 = (uint32_t)p0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

/* The finaliser of SplitMix64 (Steele et al., OOPSLA 2014) is a bijection: for one purpose, two seeds never share a key. */
void stv_rng_key(uint32_t key[2], uint64_t seed, stv_purpose purpose)
{
    uint64_t z = seed + 0x9E3779B97F4A7C15u * (uint64_t)purpose;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    key[0] = (uint32_t)z;
    key[1] = (uint32_t)(z >> 32);
}

static double draw(const uint32_t key[2], uint64_t a, uint64_t b)
{
    uint32_t out[4];
    stv_philox(out, (const uint32_t[4]){(uint32_t)a, (uint32_t)(a >> 32), (uint32_t)b, (uint32_t)(b >> 32)}, key[0], key[1]);
    uint64_t bits = (uint64_t)out[0] << 32 | out[1];
    return (double)(bits >> 11) * 0x1p-53;
}

double stv_rng_uniform(uint64_t seed, stv_purpose purpose, uint64_t a, uint64_t b)
{
    uint32_t key[2];
    stv_rng_key(key, seed, purpose);
    return draw(key, a, b);
}

void stv_rng_fill_uniform_f32(float *out, int64_t n, double low, double high, uint64_t seed, uint64_t stream)
{
    uint32_t key[2];
    stv_rng_key(key, seed, STV_RNG_INIT);
    for (int64_t i = 0; i < n; i++) out[i] = (float)(low + (high - low) * draw(key, stream, (uint64_t)i));
}

void stv_rng_fill_uniform_f64(double *out, int64_t n, double low, double high, uint64_t seed, uint64_t stream)
{
    uint32_t key[2];
    stv_rng_key(key, seed, STV_RNG_INIT);
    for (int64_t i = 0; i < n; i++) out[i] = low + (high - low) * draw(key, stream, (uint64_t)i);
}
