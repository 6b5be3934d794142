/* alloc.h - the one door through which the core gets memory, so that a test can count. */
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

/* a*b and a+b in size_t; false on overflow. */
bool stv_size_mul(size_t *out, size_t a, size_t b);
bool stv_size_add(size_t *out, size_t a, size_t b);

#endif
