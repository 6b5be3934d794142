#define _POSIX_C_SOURCE 200809L /* setenv */
#include "tensor/widen.h"

#include "check_cpu.h"

/* The value of all 65536 bit patterns by the definition of the format; NaN by its bits. */
static double f16_by_definition(uint16_t bits)
{
    int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    double magnitude = exponent == 31 ? (double)INFINITY : exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
    return bits & 0x8000 ? -magnitude : magnitude;
}

static bool is_nan_f16(uint16_t bits) { return (bits & 0x7FFF) > 0x7C00; }

static uint32_t bits_of(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

static uint16_t *all_halves(void)
{
    uint16_t *all = check_new(65536 * sizeof *all);
    for (int i = 0; i < 65536; i++) all[i] = (uint16_t)i;
    return all;
}

static void every_f16(void)
{
    uint16_t *all = all_halves();
    float *out = check_new(65536 * sizeof *out);
    stv_widen_f32(out, (stv_stored){all, STV_DTYPE_F16}, 65536);
    int wrong = 0;
    for (int i = 0; i < 65536; i++) {
        double want = f16_by_definition(all[i]);
        /* A NaN keeps sign and payload, and is quiet. */
        uint32_t nan_bits = (uint32_t)(all[i] & 0x8000) << 16 | 0x7FC00000u | (uint32_t)(all[i] & 1023) << 13;
        wrong += is_nan_f16(all[i]) ? bits_of(out[i]) != nan_bits : (double)out[i] != want || !signbit(out[i]) != !signbit(want);
    }
    CHECK_INT(wrong, 0);
}

static void every_bf16(void)
{
    uint16_t *all = all_halves();
    float *out = check_new(65536 * sizeof *out);
    stv_widen_f32(out, (stv_stored){all, STV_DTYPE_BF16}, 65536);
    int wrong = 0;
    for (int i = 0; i < 65536; i++) wrong += bits_of(out[i]) != (uint32_t)i << 16;
    CHECK_INT(wrong, 0);
}

/* One value, as packing widens it, is what a row of them gives. */
static void one_is_one_of_many(void)
{
    uint16_t *all = all_halves();
    float *many = check_new(65536 * sizeof *many), *each = check_new(65536 * sizeof *each);
    for (int bf16 = 0; bf16 < 2; bf16++) {
        stv_widen_f32(many, (stv_stored){all, bf16 ? STV_DTYPE_BF16 : STV_DTYPE_F16}, 65536);
        for (int i = 0; i < 65536; i++) each[i] = bf16 ? stv_widen_bf16(all[i]) : stv_widen_f16(all[i]);
        CHECK_SAME_BITS(bf16 ? "bf16" : "f16", many, each, 65536 * sizeof *many);
    }
}

/* Lengths around the vector widths, at odd places: nothing beyond n is written (the buffers' fences). */
static void short_rows(void)
{
    for (int64_t n = 0; n < 70; n++)
        for (int dtype = 0; dtype < STV_N_DTYPES; dtype++) {
            double *wide = check_new((size_t)n * sizeof *wide), *in = check_new((size_t)(n + 1) * sizeof *in);
            float *out = check_new((size_t)n * sizeof *out);
            memset(in, 0x3C, (size_t)(n + 1) * sizeof *in); /* an ordinary number in every type */
            stv_stored from = stv_stored_from((stv_stored){in, (stv_dtype)dtype}, 1);
            stv_widen_f64(wide, from, n);
            for (int64_t i = 1; i < n; i++) CHECK(wide[i] == wide[0] && wide[0] > 1e-20 && wide[0] < 2);
            if (dtype == STV_DTYPE_F64) continue;
            stv_widen_f32(out, from, n);
            for (int64_t i = 0; i < n; i++) CHECK((double)out[i] == wide[i]);
            check_release_buffers();
        }
}

static void which_type_holds_which(void)
{
    static const bool want[STV_N_DTYPES][STV_N_DTYPES] = {
        [STV_DTYPE_F32] = {true, true, false, false},
        [STV_DTYPE_F64] = {false, true, false, false},
        [STV_DTYPE_F16] = {true, true, true, false},
        [STV_DTYPE_BF16] = {true, true, false, true},
    };
    for (int from = 0; from < STV_N_DTYPES; from++)
        for (int to = 0; to < STV_N_DTYPES; to++) CHECK_INT(stv_dtype_widens((stv_dtype)from, (stv_dtype)to), want[from][to]);
}

static void lower_cpu_levels(void) { check_lower_cpu_levels(); }

static const check_case cases[] = {
    {"every f16", every_f16},
    {"every bf16", every_bf16},
    {"one is one of many", one_is_one_of_many},
    {"short rows", short_rows},
    {"which type holds which", which_type_holds_which},
    {"lower cpu levels", lower_cpu_levels},
};

int main(int argc, char **argv)
{
    check_program = argv[0];
    return CHECK_RUN(cases);
}
