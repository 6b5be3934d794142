/* alloc.h - the one door through which the core gets memory, so that a test can count, and let any allocation fail. */
#ifndef STV_BASE_ALLOC_H
#define STV_BASE_ALLOC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define STV_ALIGN 64 /* one cache line, one AVX-512 register */

/* 64-byte aligned, uninitialised; NULL when memory is exhausted (no message is stored). 0 bytes give a valid pointer. */
void *stv_alloc(size_t size_bytes);
void *stv_alloc_zero(size_t size_bytes);
void stv_free(void *p); /* takes NULL */

/* Number of stv_alloc calls of the process so far; equal before and after a steady step. */
uint64_t stv_alloc_count(void);
uint64_t stv_alloc_live(void); /* blocks of the process not freed yet */

/* For tests: the n-th allocation from now (1: the next) returns NULL, and with `forever` all after it; 0: none does. In every build, so that what
 * is tested is what is shipped: it costs one relaxed load where an allocation costs a hundred times that, and a steady step has none. */
void stv_alloc_fail_at(uint64_t n, bool forever);

/* a*b and a+b in size_t; false on overflow. */
bool stv_size_mul(size_t *out, size_t a, size_t b);
bool stv_size_add(size_t *out, size_t a, size_t b);

#endif
