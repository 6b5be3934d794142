/* arena.c - under AddressSanitizer every allocation is followed by a red zone and everything not handed out is poisoned, so that an operator
 * which writes past its scratch, or keeps using it after release, fails in the tests. The red zone is counted while measuring too. */
#include "base/arena.h"

#include "base/alloc.h"

#include <assert.h>
#include <stdint.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define RED_ZONE STV_ALIGN
#else
#define ASAN_POISON_MEMORY_REGION(p, size_bytes) ((void)(p), (void)(size_bytes))
#define ASAN_UNPOISON_MEMORY_REGION(p, size_bytes) ((void)(p), (void)(size_bytes))
#define RED_ZONE 0
#endif

void stv_arena_init_measuring(stv_arena *arena) { *arena = (stv_arena){.measuring = true}; }

stv_status stv_arena_create(stv_arena *arena, size_t capacity)
{
    *arena = (stv_arena){0};
    arena->base = stv_alloc(capacity);
    if (!arena->base)
        return stv_fail(STV_ERR_MEMORY, "arena: no memory for %zu bytes of activations and scratch; use a smaller batch or recompute more layers",
                        capacity);
    arena->capacity = capacity;
    ASAN_POISON_MEMORY_REGION(arena->base, capacity);
    return STV_OK;
}

stv_status stv_arena_reserve(stv_arena *arena, size_t capacity)
{
    if (!arena->base || arena->capacity < capacity) {
        stv_arena_free(arena); /* first, so that the two blocks never exist together */
        return stv_arena_create(arena, capacity);
    }
    stv_arena_release(arena, 0);
    arena->peak = 0;
    return STV_OK;
}

void stv_arena_free(stv_arena *arena)
{
    if (arena->base) ASAN_UNPOISON_MEMORY_REGION(arena->base, arena->capacity);
    stv_free(arena->base);
    *arena = (stv_arena){0};
}

void *stv_arena_alloc(stv_arena *arena, size_t size_bytes)
{
    size_t end;
    bool fits = stv_size_add(&end, size_bytes, RED_ZONE + STV_ALIGN - 1) && stv_size_add(&end, end & ~(size_t)(STV_ALIGN - 1), arena->used);
    /* A measured size beyond size_t stays at the top, where stv_arena_create refuses it. */
    if (!fits) end = SIZE_MAX & ~(size_t)(STV_ALIGN - 1);
    size_t begin = arena->used;
    arena->used = end;
    if (end > arena->peak) arena->peak = end;
    if (arena->measuring) return (void *)((uintptr_t)STV_ALIGN + begin);
    assert(fits && end <= arena->capacity);
    ASAN_UNPOISON_MEMORY_REGION(arena->base + begin, size_bytes);
    return arena->base + begin;
}

size_t stv_arena_mark(const stv_arena *arena) { return arena->used; }

void stv_arena_release(stv_arena *arena, size_t mark)
{
    assert(mark <= arena->used);
    if (!arena->measuring) ASAN_POISON_MEMORY_REGION(arena->base + mark, arena->used - mark);
    arena->used = mark;
}
