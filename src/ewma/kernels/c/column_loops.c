/* The loops over columns, whose neighbours lie side by side, each compiled once for every instruction set, with the
   same bits from all of them: what is carried lies in the nearest cache, and compilers make vectors of neighbours. */

#include "around.h"

INLINE void extremes(
    double *restrict low, double *restrict high, const char *from, int n, int begins, const Dtype dtype)
{
    INDEPENDENT
    for (int i = 0; i < n; i++) {
        const double x = read_double(from, i, dtype);
        low[i] = begins || x < low[i] ? x : low[i];
        high[i] = begins || x > high[i] ? x : high[i];
    }
}

INLINE void mean(const Tile *tile, States *states, const double *pre, const Fading *fading, const Dtype dtype)
{
    const double whole = fading->whole1, lost = fading->lost1;
    const double *restrict base = states->base + tile->column;
    double *restrict sums = states->sum + tile->column;
    double room[WIDE];
    for (int t = 0; t < tile->steps; t++) {
        const double before = pre ? pre[t] : 1.0, after = tile->post[t];
        const char *restrict from = tile->from + t * tile->from_step;
        char *there = tile->to[0] + t * tile->to_step[0];
        char *restrict to = tile->around ? (char *)room : there;
        fetch(from + tile->soon * tile->from_step, tile->width * (int)size_of(dtype));
        INDEPENDENT
        for (int i = 0; i < tile->width; i++) {
            const double u = before * (read_double(from, i, dtype) - base[i]);
            const double sum = whole * sums[i] + (u - lost * sums[i]);
            sums[i] = sum;
            write_double(to, i, base[i] + after * sum, dtype);
        }
        if (tile->around)
            write_around(there, to, (size_t)tile->width * size_of(dtype));
    }
}

/* The mean is there before the spread is. */
INLINE void spread(
    const Tile *tile, States *states, const double *factors, double scale, const Kind kind, double k,
    const Fading *fading, const Dtype dtype)
{
    const double whole = fading->whole1, lost = fading->lost1;
    const double *restrict base = states->base + tile->column;
    double *restrict sums = states->sum + tile->column, *restrict rises = states->rise + tile->column;
    double *restrict spreads = states->spread + tile->column, *restrict hidden = states->hidden + tile->column;
    for (int t = 0; t < tile->steps; t++) {
        const double share = tile->post[t], factor = scale * factors[t];
        const char *restrict from = tile->from + t * tile->from_step;
        char *restrict first = tile->to[0] + t * tile->to_step[0];
        char *restrict second = kind == BANDS ? tile->to[1] + t * tile->to_step[1] : NULL;
        char *restrict third = kind == BANDS ? tile->to[2] + t * tile->to_step[2] : NULL;
        fetch(from + tile->soon * tile->from_step, tile->width * (int)size_of(dtype));
        INDEPENDENT
        for (int i = 0; i < tile->width; i++) {
            const double u = read_double(from, i, dtype) - base[i], d = u - rises[i];
            const double sum = whole * sums[i] + (u - lost * sums[i]), rise = share * sum;
            const double fading_spread = whole * spreads[i] + (d * ((1.0 - share) * d) - lost * spreads[i]);
            sums[i] = sum;
            rises[i] = rise;
            spreads[i] = fading_spread;
            hidden[i] += HIDDEN * HIDDEN * d * d < rise * rise ? 1.0 : 0.0;
            const double variance = factor * fading_spread, width = kind == VARIANCE ? variance : sqrt(variance);
            if (kind == BANDS) {
                write_double(first, i, base[i] + (rise - k * width), dtype);
                write_double(second, i, base[i] + rise, dtype);
                write_double(third, i, base[i] + (rise + k * width), dtype);
            } else
                write_double(first, i, width, dtype);
        }
    }
}

/* One copy of each loop for each dtype. */

#define EXTREMES(dtype) extremes(low, high, from, n, begins, dtype)
#define MEANS(dtype) mean(tile, states, pre, fading, dtype)
#define VARIANCES(dtype) spread(tile, states, factors, scale, VARIANCE, k, fading, dtype)
#define DEVIATIONS(dtype) spread(tile, states, factors, scale, DEVIATION, k, fading, dtype)
#define ALL_BANDS(dtype) spread(tile, states, factors, scale, BANDS, k, fading, dtype)

#define COMPILE(version, TARGET)                                                                                   \
    TARGET static void extremes_##version(                                                                         \
        double *low, double *high, const char *from, int n, int begins, Dtype dtype)                               \
    {                                                                                                              \
        BY_DTYPE(dtype, EXTREMES)                                                                                  \
    }                                                                                                              \
    TARGET static void mean_##version(const Tile *tile, States *states, const double *pre, const Fading *fading)   \
    {                                                                                                              \
        BY_DTYPE(tile->dtype, MEANS)                                                                               \
    }                                                                                                              \
    TARGET static void spread_##version(                                                                           \
        const Tile *tile, States *states, const double *factors, double scale, Kind kind, double k,                \
        const Fading *fading)                                                                                      \
    {                                                                                                              \
        if (kind == VARIANCE) {                                                                                    \
            BY_DTYPE(tile->dtype, VARIANCES)                                                                       \
        } else if (kind == DEVIATION) {                                                                            \
            BY_DTYPE(tile->dtype, DEVIATIONS)                                                                      \
        } else {                                                                                                   \
            BY_DTYPE(tile->dtype, ALL_BANDS)                                                                       \
        }                                                                                                          \
    }

EACH_VERSION(COMPILE)

#define OF(version) {extremes_##version, mean_##version, spread_##version}

const ColumnLoops COLUMNS[VERSION_COUNT] = OF_EACH_VERSION(OF);
