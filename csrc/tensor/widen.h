/* widen.h - stored values become the numbers that are computed with. Exact, subnormals included; NaN stays NaN and infinity infinity, with the same
 * bits at every cpu level.
 *
 *   bf16   s eeeeeeee mmmmmmm       the upper half of an f32
 *   f16    s eeeee mmmmmmmmmm       IEEE 754 binary16: exponent bias 15, f32's is 127
 */
#ifndef STV_TENSOR_WIDEN_H
#define STV_TENSOR_WIDEN_H

#include "tensor/dtype.h"

/* out (n) = from (n), which is f32, f16 or bf16; for doubles f64 too. */
void stv_widen_f32(float *out, stv_stored from, int64_t n);
void stv_widen_f64(double *out, stv_stored from, int64_t n);

static inline float stv_float_of_bits(uint32_t bits)
{
    float f;
    __builtin_memcpy(&f, &bits, sizeof f);
    return f;
}

static inline float stv_widen_bf16(uint16_t bits) { return stv_float_of_bits((uint32_t)bits << 16); }

/* Without branches, so that a loop of it becomes vectors. The product of a subnormal's mantissa and its unit is taken by a subtraction of normal numbers,
 * which no flush-to-zero mode of the caller's reaches. */
static inline float stv_widen_f16(uint16_t bits)
{
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, magnitude = (uint32_t)(bits & 0x7FFF) << 13, is_subnormal = -(uint32_t)(magnitude < 1u << 23);
    uint32_t infinite = -(uint32_t)(magnitude >= 31u << 23), quiet = -(uint32_t)(magnitude > 31u << 23) & 1u << 22;
    uint32_t normal = (magnitude + (112u << 23) + (infinite & 112u << 23)) | quiet, subnormal;
    float tiny = stv_float_of_bits(magnitude + (113u << 23)) - stv_float_of_bits(113u << 23);
    __builtin_memcpy(&subnormal, &tiny, sizeof tiny);
    return stv_float_of_bits(sign | (subnormal & is_subnormal) | (normal & ~is_subnormal));
}

#endif
