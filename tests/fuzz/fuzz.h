/* fuzz.h - what the C targets share: an input read as numbers, and promises that end the process when they do not hold.
 *
 * A target defines LLVMFuzzerTestOneInput. libFuzzer calls it with inputs that it invents (`make fuzz`), replay.c with the files of the corpus
 * (`make test`, any compiler). A finding is a sanitizer's report, a FUZZ_REQUIRE that fails, or too much time or memory. */
#ifndef STV_TESTS_FUZZ_H
#define STV_TESTS_FUZZ_H

#include "stllava.h"

#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

#define FUZZ_REQUIRE(condition) ((condition) ? (void)0 : fuzz_broken(#condition, __FILE__, __LINE__))

static inline void fuzz_broken(const char *text, const char *file, int line)
{
    fprintf(stderr, "%s:%d: broken promise: %s (last error: %s)\n", file, line, text, stv_last_error());
    abort();
}

/* A call may work, or be refused with a reason; `code` and nothing else. */
static inline bool fuzz_refused(stv_status status)
{
    FUZZ_REQUIRE(status != STV_ERR_INTERNAL);
    FUZZ_REQUIRE(status == STV_OK || stv_last_error()[0]);
    return status != STV_OK;
}

typedef struct fuzz_input {
    const uint8_t *p;
    size_t n;
} fuzz_input;

static inline uint64_t fuzz_bits(fuzz_input *in, int n_bytes) /* zeros after the end */
{
    uint64_t bits = 0;
    for (int i = 0; i < n_bytes && in->n; i++, in->p++, in->n--) bits |= (uint64_t)*in->p << 8 * i;
    return bits;
}

static inline int fuzz_byte(fuzz_input *in) { return (int)fuzz_bits(in, 1); }

/* One byte gives a small number; the upper third of its values stands for eight bytes that follow, as they are. */
static inline int64_t fuzz_number(fuzz_input *in)
{
    int byte = fuzz_byte(in);
    return byte < 170 ? byte : (int64_t)fuzz_bits(in, 8);
}

/* The same for fractions: quarters, or the bits of a double (NaN, infinities and denormals among them). */
static inline double fuzz_fraction(fuzz_input *in)
{
    int byte = fuzz_byte(in);
    union {
        uint64_t bits;
        double value;
    } any;
    if (byte < 170) return byte / 4.0;
    any.bits = fuzz_bits(in, 8);
    return any.value;
}

/* Memory that a hostile size asks for is refused, not reported. */
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "allocator_may_return_null=1"; }

#endif
