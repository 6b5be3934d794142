/* target.h - functions between STV_TARGET_BEGIN("avx2,fma") and STV_TARGET_END are compiled for these instructions, whatever the rest of the file
 * is compiled for. They must only be called where stv_cpu() says so. One spelling for GCC and clang. */
#ifndef STV_BASE_TARGET_H
#define STV_BASE_TARGET_H

#define STV_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define STV_TARGET_BEGIN(instructions) STV_PRAGMA(clang attribute push(__attribute__((target(instructions))), apply_to = function))
#define STV_TARGET_END _Pragma("clang attribute pop")
#else
#define STV_TARGET_BEGIN(instructions) _Pragma("GCC push_options") STV_PRAGMA(GCC target(instructions))
#define STV_TARGET_END _Pragma("GCC pop_options")
#endif

#endif
