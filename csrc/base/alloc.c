#include "base/alloc.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static atomic_uint_least64_t n_allocations, n_live;
static atomic_uint_least64_t fail_begin = UINT64_MAX, fail_end; /* allocations of these numbers fail */

static bool told_to_fail(uint64_t number)
{
    return number >= atomic_load_explicit(&fail_begin, memory_order_relaxed) && number < atomic_load_explicit(&fail_end, memory_order_relaxed);
}

void *stv_alloc(size_t size_bytes)
{
    size_t rounded;
    if (!stv_size_add(&rounded, size_bytes ? size_bytes : 1, STV_ALIGN - 1)) return NULL;
    rounded &= ~(size_t)(STV_ALIGN - 1);
    if (told_to_fail(atomic_fetch_add_explicit(&n_allocations, 1, memory_order_relaxed))) return NULL;
    void *p = aligned_alloc(STV_ALIGN, rounded);
    if (p) atomic_fetch_add_explicit(&n_live, 1, memory_order_relaxed);
    return p;
}

void *stv_alloc_zero(size_t size_bytes)
{
    void *p = stv_alloc(size_bytes);
    if (p) memset(p, 0, size_bytes);
    return p;
}

void stv_free(void *p)
{
    if (p) atomic_fetch_sub_explicit(&n_live, 1, memory_order_relaxed);
    free(p);
}

uint64_t stv_alloc_count(void) { return atomic_load_explicit(&n_allocations, memory_order_relaxed); }

uint64_t stv_alloc_live(void) { return atomic_load_explicit(&n_live, memory_order_relaxed); }

void stv_alloc_fail_at(uint64_t n, bool forever)
{
    uint64_t begin = n ? stv_alloc_count() + n - 1 : UINT64_MAX;
    atomic_store(&fail_begin, UINT64_MAX);
    atomic_store(&fail_end, forever || !n ? UINT64_MAX : begin + 1);
    atomic_store(&fail_begin, begin);
}

bool stv_size_mul(size_t *out, size_t a, size_t b) { return !__builtin_mul_overflow(a, b, out); }

bool stv_size_add(size_t *out, size_t a, size_t b) { return !__builtin_add_overflow(a, b, out); }
