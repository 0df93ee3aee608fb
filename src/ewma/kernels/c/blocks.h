/* The update of one block of elements, and the filter of what it was updated by; see lerp.c.

   Values are converted as they are read, and checked for NaN and infinity. Where plain rounding would stall, results
   are rounded stochastically by the bits that noise.py defines. The arithmetic is the same, bit for bit, for every
   instruction set and any number of threads: no operations are fused or reordered. */

#ifndef EWMA_BLOCKS_H
#define EWMA_BLOCKS_H

#include "native.h"

/* One of the K sets of averages, and how it is updated now: rounded stochastically by a word, or to the nearest. */
typedef struct {
    double coefficient;
    uint32_t word;
    int rounded;
} Set;

/* One call: a row for each tensor, and what holds for all of them. */
typedef struct {
    const uint64_t *rows;
    size_t count, sets;
    Dtype value_dtype, average_dtype;
    int guard, filters;
    double raw, slow;
    Set set[];
} Update;

#define LARGEST_FLOAT 0x7f7fffffu
#define LARGEST_DOUBLE 0x7fefffffffffffffu

INLINE double largest_of(Dtype dtype)
{
    return dtype == FLOAT32 ? FLT_MAX : dtype == FLOAT64 ? DBL_MAX : dtype == BFLOAT16 ? 0x1.fep127 : 0x1.ffcp15;
}

/* The random bits and the rounding of noise.py. */

enum { DROPPED_FLOAT32 = 29, DROPPED_BFLOAT16 = 45, DROPPED_FLOAT16 = 42 };

static const uint32_t GOLDEN = 0x9E3779B9;

INLINE uint32_t mix(uint32_t x)
{
    x = (x ^ x >> 16) * 0x7FEB352Du;
    x = (x ^ x >> 15) * 0x846CA68Bu;
    return x ^ x >> 16;
}

INLINE float round_stochastically(double exact, uint32_t random, Dtype dtype)
{
    const int dropped = dtype == FLOAT32 ? DROPPED_FLOAT32 : DROPPED_BFLOAT16;
    const uint64_t noise = dropped < 32 ? (uint64_t)(random >> (32 - dropped)) : (uint64_t)random << (dropped - 32);
    return (float)double_of((bits_of_double(exact) + noise) & ~(((uint64_t)1 << dropped) - 1));
}

/* The same for float16, whose bits are a double's upper ones less the difference of the exponents. A subnormal number
   is lifted to among the smallest normal ones, which have the same spacing, and its bits are put back. */
INLINE uint32_t half_stochastically(double exact, uint32_t random)
{
    const double size = fabs(exact);
    const int subnormal = size < 0x1p-14;
    const uint64_t noise = (uint64_t)random << (DROPPED_FLOAT16 - 32);
    const uint64_t bits = bits_of_double(subnormal ? size + 0x1p-14 : size) + noise;
    const uint32_t sign = bits_of_double(exact) >> 48 & 0x8000;
    return sign | ((uint32_t)(bits >> DROPPED_FLOAT16) - ((subnormal ? 1009u : 1008u) << 10));
}

/* An element that stays is written as it was. */
INLINE void write_rounded(void *to, int i, double exact, uint32_t random, int stays, Dtype dtype)
{
    if (dtype == FLOAT16) {
        uint16_t *halves = to;
        halves[i] = stays ? halves[i] : (uint16_t)half_stochastically(exact, random);
    }
    else
        write_double(to, i, stays ? read_float(to, i, dtype) : round_stochastically(exact, random, dtype), dtype);
}

/* The update of one block. Each of the three gives whether there are elements that it leaves as they are, for
   `carefully`: those whose difference is too large or no number, and values that are no smaller than the largest number
   of the average's kind. From c = 0.5 on it starts at the value, so that c = 1 gives the value itself. */

INLINE uint32_t size_for(float value, float old, Dtype average_dtype, Dtype value_dtype)
{
    const uint32_t difference = bits_of_float(value - old) & INT32_MAX;
    if (largest_of(value_dtype) <= largest_of(average_dtype))
        return difference;
    const uint32_t limit = bits_of_float((float)largest_of(average_dtype));
    const uint32_t size = (bits_of_float(value) & INT32_MAX) + (LARGEST_FLOAT + 1 - limit);
    return size > difference ? size : difference;
}

INLINE int nearest_in_float(
    void *restrict averages, const void *restrict values, int n, double c, Dtype average_dtype, Dtype value_dtype)
{
    const int near = c >= 0.5;
    const float factor = (float)(near ? c - 1.0 : c);
    uint32_t largest = 0;
    INDEPENDENT
    for (int i = 0; i < n; i++) {
        const float value = read_float(values, i, value_dtype), old = read_float(averages, i, average_dtype);
        const float difference = value - old, moved = (near ? value : old) + factor * difference;
        const uint32_t size = size_for(value, old, average_dtype, value_dtype);
        largest = size > largest ? size : largest;
        write_double(averages, i, size > LARGEST_FLOAT ? old : moved, average_dtype);
    }
    return largest > LARGEST_FLOAT;
}

INLINE int nearest_in_double(double *restrict averages, const void *restrict values, int n, double c, Dtype value_dtype)
{
    const int near = c >= 0.5;
    const double factor = near ? c - 1.0 : c;
    uint64_t largest = 0;
    INDEPENDENT
    for (int i = 0; i < n; i++) {
        const double value = read_double(values, i, value_dtype), old = averages[i];
        const double difference = value - old, moved = (near ? value : old) + factor * difference;
        const uint64_t size = bits_of_double(difference) & INT64_MAX;
        largest = size > largest ? size : largest;
        averages[i] = size > LARGEST_DOUBLE ? old : moved;
    }
    return largest > LARGEST_DOUBLE;
}

INLINE int stochastic(
    void *restrict averages, const void *restrict values, int n, double c, uint32_t place, Dtype average_dtype,
    Dtype value_dtype)
{
    const int near = c >= 0.5;
    const double factor = near ? c - 1.0 : c;
    uint32_t largest = 0;
    INDEPENDENT
    for (int i = 0; i < n; i++, place += GOLDEN) {
        const float narrow = read_float(values, i, value_dtype), old = read_float(averages, i, average_dtype);
        const double value = read_double(values, i, value_dtype);
        const double moved = (near ? value : (double)old) + factor * (value - (double)old);
        const uint32_t size = size_for(narrow, old, average_dtype, value_dtype);
        largest = size > largest ? size : largest;
        write_rounded(averages, i, moved, mix(place), size > LARGEST_FLOAT, average_dtype);
    }
    return largest > LARGEST_FLOAT;
}

/* Whether it is a finite number of this kind, rounded to the nearest. */
static int fits(double x, Dtype dtype)
{
    union { double d; float f; uint16_t u; } nearest;
    write_double(&nearest, 0, x, dtype);
    return isfinite(read_double(&nearest, 0, dtype));
}

/* The elements that the fast loops left. A value that is no finite number of the average's kind stays out; an average
   that is NaN has seen nothing yet and takes the value whole. Gives how many values stayed out. */
static size_t carefully(
    void *averages, const void *values, int n, const Set *set, uint32_t offset, const Update *update)
{
    const Dtype dtype = update->average_dtype;
    const double c = set->coefficient;
    size_t skipped = 0;
    for (int i = 0; i < n; i++) {
        const double value = read_double(values, i, update->value_dtype), old = read_double(averages, i, dtype);
        const double difference = value - old;
        if (dtype == FLOAT64 ? isfinite(difference)
                             : size_for((float)value, (float)old, dtype, update->value_dtype) <= LARGEST_FLOAT)
            continue;
        if (update->guard && !fits(value, dtype)) {
            skipped++;
            continue;
        }
        const double kept = c == 1.0 && isinf(old) ? 0.0 : (1.0 - c) * old;
        double result = !isfinite(difference) ? kept + c * value
            : c >= 0.5                        ? value + (c - 1.0) * difference
                                              : old + c * difference;
        if (update->guard && isnan(old))
            result = value;
        if (isnan(result))
            result = NAN; /* a payload might be rounded into a number */
        if (set->rounded && fabs(result) <= largest_of(dtype))
            write_rounded(averages, i, result, mix((uint32_t)i * GOLDEN + offset), 0, dtype);
        else
            write_double(averages, i, result, dtype);
    }
    return skipped;
}

INLINE int lerp_block(
    void *averages, const void *values, int n, const Set *set, uint32_t offset, Dtype average_dtype, Dtype value_dtype)
{
    const double c = set->coefficient;
    if (average_dtype == FLOAT64)
        return nearest_in_double(averages, values, n, c, value_dtype);
    if (set->rounded)
        return stochastic(averages, values, n, c, offset, average_dtype, value_dtype);
    return nearest_in_float(averages, values, n, c, average_dtype, value_dtype);
}

/* The filter. Where there is a guard, a NaN is an average that has seen nothing: such a value stays as it came. */

INLINE void filter_in_float(
    void *restrict values, const float *restrict averages, int n, float raw, float slow, int guard, Dtype value_dtype)
{
    INDEPENDENT
    for (int i = 0; i < n; i++) {
        const float value = read_float(values, i, value_dtype), average = averages[i];
        const float filtered = raw == 0.0f ? slow * average : raw * value + slow * average;
        write_double(values, i, guard && average != average ? value : filtered, value_dtype);
    }
}

INLINE void filter_in_double(
    void *restrict values, const double *restrict averages, int n, double raw, double slow, int guard,
    Dtype value_dtype)
{
    INDEPENDENT
    for (int i = 0; i < n; i++) {
        const double value = read_double(values, i, value_dtype), average = averages[i];
        const double filtered = raw == 0.0 ? slow * average : raw * value + slow * average;
        write_double(values, i, guard && average != average ? value : filtered, value_dtype);
    }
}

INLINE void square_block(
    void *restrict squares, const void *restrict values, int n, double c, int guard, Dtype dtype, Dtype value_dtype)
{
    INDEPENDENT
    for (int i = 0; i < n; i++) {
        const double value = read_double(values, i, value_dtype), old = read_double(squares, i, dtype);
        const double square = value * value, limit = dtype == FLOAT64 ? DBL_MAX : FLT_MAX;
        const double moved = guard && old != old ? square : old + c * (square - old);
        write_double(squares, i, !guard || square <= limit ? moved : old, dtype);
    }
}

INLINE void filter_block(
    void *values, const void *averages, int n, const Update *update, Dtype average_dtype, Dtype value_dtype)
{
    if (average_dtype == FLOAT64)
        filter_in_double(values, averages, n, update->raw, update->slow, update->guard, value_dtype);
    else if (average_dtype == FLOAT32)
        filter_in_float(values, averages, n, (float)update->raw, (float)update->slow, update->guard, value_dtype);
}

#endif
