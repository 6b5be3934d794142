/* rng.h - counter-based randomness: Philox4x32-10.
 *
 * No generator has state: a draw is a function of (seed, purpose, counters), so dropout masks need no memory and a resumed or
 * re-threaded run draws the same numbers.
 * Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC11. */
#ifndef STV_BASE_RNG_H
#define STV_BASE_RNG_H

#include <stdint.h>

/* What a stream is for; part of the key, so that two purposes never share draws. */
typedef enum stv_purpose { STV_RNG_DROPOUT = 1, STV_RNG_SAMPLE = 2, STV_RNG_INIT = 3, STV_RNG_USER = 4 } stv_purpose;

/* Raw block function: 10 rounds, key (k0,k1), counter c[4]. */
void stv_philox(uint32_t out[4], const uint32_t counter[4], uint32_t key0, uint32_t key1);

/* Mixes a 64-bit seed and a purpose into a Philox key. */
void stv_rng_key(uint32_t key[2], uint64_t seed, stv_purpose purpose);

/* Uniform in [0,1) with 53 bits from the counter (a, b). */
double stv_rng_uniform(uint64_t seed, stv_purpose purpose, uint64_t a, uint64_t b);

/* out[i] = low + (high - low) * u_i, u_i drawn at counter (stream, i). */
void stv_rng_fill_uniform_f32(float *out, int64_t n, double low, double high, uint64_t seed, uint64_t stream);
void stv_rng_fill_uniform_f64(double *out, int64_t n, double low, double high, uint64_t seed, uint64_t stream);

#endif
