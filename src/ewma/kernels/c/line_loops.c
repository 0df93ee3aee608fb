/* The loops over lines, whose steps lie side by side, each compiled once for every instruction set, with the same bits
   from all of them.

   A line goes through registers of 8. What it is given is summed over windows of 2, 4, 8 and 16 steps, each value as
   faded as it then is; and every 16th sum is one recurrence, so 16 of them go on side by side. */

#include "scan.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi" /* nothing here passes vectors to what is not inline */
#endif

/* Doubles in a vector; bytes that are asked for before they are read. */
enum { LANES = 8, AHEAD = 2048 };

typedef double Doubles __attribute__((vector_size(LANES * sizeof(double))));
typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));

typedef int64_t Places __attribute__((vector_size(LANES * sizeof(int64_t))));

#if defined(__clang__)
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (Places){__VA_ARGS__})
#endif

/* What came 1, 2 and 4 steps before each of x, `before` being what came before x. */
#define BACK_1(before, x) SHUFFLE(before, x, 7, 8, 9, 10, 11, 12, 13, 14)
#define BACK_2(before, x) SHUFFLE(before, x, 6, 7, 8, 9, 10, 11, 12, 13)
#define BACK_4(before, x) SHUFFLE(before, x, 4, 5, 6, 7, 8, 9, 10, 11)

INLINE Doubles load(const void *from, const Dtype dtype)
{
    const float *x = from;
    Doubles whole;
    if (dtype == FLOAT32) /* of this GCC makes one instruction, of a conversion of vectors four */
        return (Doubles){x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]};
    memcpy(&whole, from, sizeof whole);
    return whole;
}

INLINE void store(void *to, const Doubles *x, const Dtype dtype)
{
    if (dtype == FLOAT32) {
        const Floats narrow = __builtin_convertvector(*x, Floats);
        memcpy(to, &narrow, sizeof narrow);
    } else
        memcpy(to, x, sizeof *x);
}

/* Sums over windows of 1, 2, 4 and 8 steps, the last eight of each; and every 16th sum of all. */
typedef struct {
    Doubles one, two, four, eight, even, odd;
} Windows;

/* After `sum`, which stands for all that came before, one step before the first. */
INLINE void begin(Windows *w, double sum)
{
    const Doubles last = {0, 0, 0, 0, 0, 0, 0, sum}, none = {0};
    w->one = w->two = w->four = w->eight = w->odd = last;
    w->even = none;
}

/* The next sixteen. */
INLINE void slide(Windows *w, const Doubles *first, const Doubles *second, const Fading *fading)
{
    const double *keep = fading->keep, k1 = keep[1], k2 = keep[2], k4 = keep[4], k8 = keep[8];
    const double whole = fading->whole, lost = fading->lost;
    const Doubles a = *first, b = *second;
    const Doubles a2 = a + k1 * BACK_1(w->one, a), b2 = b + k1 * BACK_1(a, b);
    const Doubles a4 = a2 + k2 * BACK_2(w->two, a2), b4 = b2 + k2 * BACK_2(a2, b2);
    const Doubles a8 = a4 + k4 * BACK_4(w->four, a4), b8 = b4 + k4 * BACK_4(a4, b4);
    w->even = whole * w->even + ((a8 + k8 * w->eight) - lost * w->even);
    w->odd = whole * w->odd + ((b8 + k8 * a8) - lost * w->odd);
    w->one = b, w->two = b2, w->four = b4, w->eight = b8;
}

/* The sum after the last step; NaN where it, or that after another of the last sixteen, is not finite: the sums of
   steps that lie apart by less are not made of each other. */
INLINE double end_of(const Windows *w)
{
    const Doubles none = 0.0 * w->even + 0.0 * w->odd;
    double all = 0.0;
    for (int k = 0; k < LANES; k++)
        all += none[k];
    return all == 0.0 ? w->odd[LANES - 1] : NAN;
}

INLINE double line(
    char *restrict to, const char *restrict from, int n, double base, double sum, const double *restrict post,
    const Fading *fading, const Dtype dtype)
{
    const int size = (int)size_of(dtype);
    const Fading near = *fading;
    Windows w;
    begin(&w, sum);
    for (int i = 0; i < n; i += WINDOW) {
        fetch(from + i * size + AHEAD, WINDOW * size);
        const Doubles a = load(from + i * size, dtype) - base, b = load(from + (i + LANES) * size, dtype) - base;
        slide(&w, &a, &b, &near);
        const Doubles first = post ? base + load(post + i, FLOAT64) * w.even : w.even;
        const Doubles second = post ? base + load(post + i + LANES, FLOAT64) * w.odd : w.odd;
        store(to + i * size, &first, dtype);
        store(to + (i + LANES) * size, &second, dtype);
    }
    return end_of(&w);
}

/* How far each value lies from the mean before it; counts those that the mean hides. */
INLINE void compare(Doubles *distance, const Doubles *u, const Doubles *before, const Doubles *rise, Places *hidden)
{
    *distance = *u - BACK_1(*before, *rise);
    *hidden -= HIDDEN * HIDDEN * *distance * *distance < *rise * *rise;
}

INLINE void spread_line(
    double *restrict rises, double *restrict spreads, const double *restrict u, int n, const double *restrict post,
    const Fading *fading, State *state)
{
    const Fading near = *fading;
    Windows mean, spread;
    Doubles rise = {0, 0, 0, 0, 0, 0, 0, state->rise};
    Places hidden = {0};
    begin(&mean, state->sum);
    begin(&spread, state->spread);
    for (int i = 0; i < n; i += WINDOW) {
        const Doubles a = load(u + i, FLOAT64), b = load(u + i + LANES, FLOAT64);
        const Doubles share = load(post + i, FLOAT64), other = load(post + i + LANES, FLOAT64);
        slide(&mean, &a, &b, &near);
        const Doubles first = share * mean.even, second = other * mean.odd;
        Doubles c, d;
        compare(&c, &a, &rise, &first, &hidden);
        compare(&d, &b, &first, &second, &hidden);
        rise = second;
        c *= (1.0 - share) * c;
        d *= (1.0 - other) * d;
        slide(&spread, &c, &d, &near);
        store(rises + i, &first, FLOAT64);
        store(rises + i + LANES, &second, FLOAT64);
        store(spreads + i, &spread.even, FLOAT64);
        store(spreads + i + LANES, &spread.odd, FLOAT64);
    }
    for (int k = 0; k < LANES; k++)
        state->hidden += (double)hidden[k];
    state->rise = rise[LANES - 1];
    state->sum = end_of(&mean);
    state->spread = end_of(&spread);
}

INLINE void widths(double *restrict spreads, int n, const double *restrict factor, double scale, const int root)
{
    INDEPENDENT
    for (int i = 0; i < n; i++) {
        const double variance = scale * factor[i] * spreads[i];
        spreads[i] = root ? sqrt(variance) : variance;
    }
}

INLINE double reach(
    const char *restrict from, ptrdiff_t n, double base, double sum, const Fading *fading, const Dtype dtype)
{
    const double whole = fading->whole, lost = fading->lost;
    const int size = (int)size_of(dtype);
    Doubles even = {0}, odd = {0, 0, 0, 0, 0, 0, 0, sum};
    for (; n >= WINDOW; n -= WINDOW, from += WINDOW * size) {
        fetch(from + AHEAD, WINDOW * size);
        even = whole * even + ((load(from, dtype) - base) - lost * even);
        odd = whole * odd + ((load(from + LANES * size, dtype) - base) - lost * odd);
    }
    double total = 0.0;
    for (int k = 0; k < LANES; k++)
        total += fading->keep[WINDOW - 1 - k] * even[k] + fading->keep[LANES - 1 - k] * odd[k];
    return total;
}

/* Whole windows of shares, `1 / weight`. */
INLINE void shares(double *restrict to, int n, double weight, double left, const double *restrict ramp, double keep)
{
    for (int i = 0; i < n; i += WINDOW) {
        for (int k = 0; k < WINDOW; k++)
            to[i + k] = 1.0 / (weight + left * ramp[k + 1]);
        weight += left * ramp[WINDOW];
        left *= keep;
    }
}

/* Steps of 1 and -1 are told to the compiler, which has vectors for them. */

INLINE void read_steps(double *restrict u, const char *from, int n, ptrdiff_t step, double base, const Dtype dtype)
{
    const ptrdiff_t size = (ptrdiff_t)size_of(dtype);
    if (step == 1) {
        INDEPENDENT
        for (int i = 0; i < n; i++)
            u[i] = read_double(from, i, dtype) - base;
    } else if (step == -1) {
        INDEPENDENT
        for (int i = 0; i < n; i++)
            u[i] = read_double(from, -i, dtype) - base;
    } else
        for (int i = 0; i < n; i++)
            u[i] = read_double(from + i * step * size, 0, dtype) - base;
}

INLINE void write_steps(
    char *to, const double *restrict y, int n, ptrdiff_t step, double base, const double *restrict post,
    const Dtype dtype)
{
    const ptrdiff_t size = (ptrdiff_t)size_of(dtype);
    if (step == 1) {
        INDEPENDENT
        for (int i = 0; i < n; i++)
            write_double(to, i, base + (post ? post[i] : 1.0) * y[i], dtype);
    } else if (step == -1) {
        INDEPENDENT
        for (int i = 0; i < n; i++)
            write_double(to, -i, base + (post ? post[i] : 1.0) * y[i], dtype);
    } else
        for (int i = 0; i < n; i++)
            write_double(to + i * step * size, 0, base + (post ? post[i] : 1.0) * y[i], dtype);
}

#define COMPILE(version, TARGET)                                                                                   \
    TARGET static void read_##version(                                                                             \
        double *u, const char *from, int n, ptrdiff_t step, double base, Dtype dtype)                              \
    {                                                                                                              \
        BY_DTYPE(dtype, READ)                                                                                      \
    }                                                                                                              \
    TARGET static void write_##version(                                                                            \
        char *to, const double *y, int n, ptrdiff_t step, double base, const double *post, Dtype dtype)            \
    {                                                                                                              \
        BY_DTYPE(dtype, WRITE)                                                                                     \
    }                                                                                                              \
    TARGET static double line_##version(                                                                           \
        char *to, const char *from, int n, double base, double sum, const double *post, const Fading *fading,      \
        Dtype dtype)                                                                                               \
    {                                                                                                              \
        if (!post)                                                                                                 \
            return line(to, from, n, base, sum, NULL, fading, FLOAT64);                                            \
        return dtype == FLOAT32 ? line(to, from, n, base, sum, post, fading, FLOAT32)                              \
                                : line(to, from, n, base, sum, post, fading, FLOAT64);                             \
    }                                                                                                              \
    TARGET static void spread_##version(                                                                           \
        double *rises, double *spreads, const double *u, int n, const double *post, const Fading *fading,          \
        State *state)                                                                                             \
    {                                                                                                              \
        spread_line(rises, spreads, u, n, post, fading, state);                                                    \
    }                                                                                                              \
    TARGET static void widths_##version(double *spreads, int n, const double *factor, double scale, int root)       \
    {                                                                                                              \
        if (root)                                                                                                  \
            widths(spreads, n, factor, scale, 1);                                                                  \
        else                                                                                                       \
            widths(spreads, n, factor, scale, 0);                                                                  \
    }                                                                                                              \
    TARGET static void edges_##version(                                                                            \
        double *restrict to, const double *restrict rises, const double *restrict widths, int n, double far)       \
    {                                                                                                              \
        for (int i = 0; i < n; i++)                                                                                \
            to[i] = rises[i] + far * widths[i];                                                                    \
    }                                                                                                              \
    TARGET static double reach_##version(                                                                          \
        const char *from, ptrdiff_t n, double base, double sum, const Fading *fading, Dtype dtype)                 \
    {                                                                                                              \
        return dtype == FLOAT32 ? reach(from, n, base, sum, fading, FLOAT32)                                       \
                                : reach(from, n, base, sum, fading, FLOAT64);                                      \
    }                                                                                                              \
    TARGET static void shares_##version(                                                                           \
        double *to, int n, double weight, double left, const double *ramp, double keep)                            \
    {                                                                                                              \
        shares(to, n, weight, left, ramp, keep);                                                                   \
    }

#define READ(dtype) read_steps(u, from, n, step, base, dtype)
#define WRITE(dtype) write_steps(to, y, n, step, base, post, dtype)

EACH_VERSION(COMPILE)

#define OF(version)                                                                                                \
    {read_##version, write_##version, line_##version, spread_##version, widths_##version, edges_##version,         \
     reach_##version, shares_##version}

const LineLoops LINE[VERSION_COUNT] = OF_EACH_VERSION(OF);
