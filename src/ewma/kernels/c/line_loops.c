/* The loops over lines, whose steps lie side by side, each compiled once for every instruction set, with the same bits
   from all of them. Windows of steps (windows.h) are in vectors as wide as the instruction set is quickest with. */

#include "scan.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi" /* nothing here passes vectors to what is not inline */
#define UNROLL _Pragma("GCC unroll 16")
#elif defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif

/* Bytes that are asked for before they are read. */
enum { AHEAD = 2048 };

#define LANES 8
#include "windows.h"
#undef LANES
#define LANES 4
#include "windows.h"
#undef LANES

/* Doubles in a vector of each. */
#define WIDTH_avx512 8
#define WIDTH_avx2 4
#define WIDTH_baseline 4
#define JOIN(name, lanes) name##_##lanes
#define JOINED(name, lanes) JOIN(name, lanes)
#define OF_WIDTH(name, version) JOINED(name, WIDTH_##version)

INLINE void widths(double *restrict spreads, int n, const double *restrict factor, double scale, const int root)
{
    INDEPENDENT
    for (int i = 0; i < n; i++) {
        const double variance = scale * factor[i] * spreads[i];
        spreads[i] = root ? sqrt(variance) : variance;
    }
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
            return OF_WIDTH(line, version)(to, from, n, base, sum, NULL, fading, FLOAT64);                         \
        return dtype == FLOAT32                                                                                    \
            ? OF_WIDTH(line, version)(to, from, n, base, sum, post, fading, FLOAT32)                               \
            : OF_WIDTH(line, version)(to, from, n, base, sum, post, fading, FLOAT64);                              \
    }                                                                                                              \
    TARGET static void spread_##version(                                                                           \
        double *rises, double *spreads, const double *u, int n, const double *post, const Fading *fading,          \
        State *state)                                                                                              \
    {                                                                                                              \
        OF_WIDTH(spread, version)(rises, spreads, u, n, post, fading, state);                                      \
    }                                                                                                              \
    TARGET static void widths_##version(double *spreads, int n, const double *factor, double scale, int root)      \
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
        return dtype == FLOAT32                                                                                    \
            ? OF_WIDTH(reach, version)(from, n, base, sum, fading, FLOAT32)                                        \
            : OF_WIDTH(reach, version)(from, n, base, sum, fading, FLOAT64);                                       \
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
