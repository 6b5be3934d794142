/* arena.h - one block of memory for every activation and scratch buffer of a run.
 *
 *   +--------------------------------------------------------------+
 *   | saved activations (forward) ---->        | scratch (released) |
 *   +--------------------------------------------------------------+
 *   base                                  used                capacity
 *
 * Planning runs the very same forward and backward on a *measuring* arena: allocation only
 * counts and hands out addresses that nobody reads, because every operator returns at once
 * while stv_measuring() holds. `peak` is then the capacity the real run needs. There is no
 * second place where sizes are computed. */
#ifndef STV_BASE_ARENA_H
#define STV_BASE_ARENA_H

#include "base/status.h"

#include <stdbool.h>
#include <stddef.h>

typedef struct stv_arena {
    char *base;
    size_t capacity, used, peak;
    bool measuring;
} stv_arena;

/* Counts only; needs no free. */
void stv_arena_init_measuring(stv_arena *arena);
/* Owns `capacity` bytes until stv_arena_free. Errors: memory. */
stv_status stv_arena_create(stv_arena *arena, size_t capacity);
/* Empties a real (or zeroed) arena and makes it hold `capacity` bytes; a new block only if it was too small. Errors: memory (then it holds nothing). */
stv_status stv_arena_reserve(stv_arena *arena, size_t capacity);
void stv_arena_free(stv_arena *arena); /* takes an arena that was zeroed or freed */

/* 64-byte aligned, uninitialised, never NULL: a real arena was measured first (asserted). */
void *stv_arena_alloc(stv_arena *arena, size_t size_bytes);

/* Stack discipline: everything allocated after the mark is given back. */
size_t stv_arena_mark(const stv_arena *arena);
void stv_arena_release(stv_arena *arena, size_t mark);

#endif
