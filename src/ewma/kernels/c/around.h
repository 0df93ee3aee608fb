/* Results that go around the caches. */

#ifndef EWMA_AROUND_H
#define EWMA_AROUND_H

#include "scan.h"

#ifdef MANY_INSTRUCTION_SETS
#include <immintrin.h>

enum { WORD = sizeof(__m128i) };

/* Whole words, which the processor gathers into lines of the cache without fetching first what those held. */
INLINE void write_around(char *to, const char *from, size_t size)
{
    for (size_t k = 0; k < size; k += WORD)
        _mm_stream_si128((__m128i *)(to + k), _mm_loadu_si128((const __m128i *)(from + k)));
}
#else
enum { WORD = 1 };

INLINE void write_around(char *to, const char *from, size_t size) { memcpy(to, from, size); }
#endif

#endif
