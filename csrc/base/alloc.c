#include "base/alloc.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static atomic_uint_least64_t n_allocations;

void *stv_alloc(size_t size_bytes)
{
    size_t rounded;
    if (!stv_size_add(&rounded, size_bytes ? size_bytes : 1, STV_ALIGN - 1)) return NULL;
    rounded &= ~(size_t)(STV_ALIGN - 1);
    atomic_fetch_add_explicit(&n_allocations, 1, memory_order_relaxed);
    return aligned_alloc(STV_ALIGN, rounded);
}

void *stv_alloc_zero(size_t size_bytes)
{
    void *p = stv_alloc(size_bytes);
    if (p) memset(p, 0, size_bytes);
    return p;
}

void stv_free(void *p) { free(p); }

uint64_t stv_alloc_count(void) { return atomic_load_explicit(&n_allocations, memory_order_relaxed); }

bool stv_size_mul(size_t *out, size_t a, size_t b) { return !__builtin_mul_overflow(a, b, out); }

bool stv_size_add(size_t *out, size_t a, size_t b) { return !__builtin_add_overflow(a, b, out); }
