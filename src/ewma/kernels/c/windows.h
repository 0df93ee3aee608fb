/* Sums over windows of steps of a line, in vectors of LANES: line_loops.c includes this once for each width. What is
   computed does not depend on it, bit for bit.

   What is given is summed over windows of 2, 4, 8 and 16 steps, each value as faded as it then is; and every 16th sum
   is one recurrence, so 16 of them go on side by side. */

#define JOIN(name, lanes) name##_##lanes
#define JOINED(name, lanes) JOIN(name, lanes)
#define OWN(name) JOINED(name, LANES)
#define COUNT (WINDOW / LANES)

#if LANES == 8
#define RUN(i) i, i + 1, i + 2, i + 3, i + 4, i + 5, i + 6, i + 7
#define EACH(x) x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]
#else
#define RUN(i) i, i + 1, i + 2, i + 3
#define EACH(x) x[0], x[1], x[2], x[3]
#endif

#define Doubles OWN(Doubles)
#define Floats OWN(Floats)
#define Places OWN(Places)
#define Windows OWN(Windows)

typedef double Doubles __attribute__((vector_size(LANES * sizeof(double))));
typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef int64_t Places __attribute__((vector_size(LANES * sizeof(int64_t))));

#if defined(__clang__)
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (Places){__VA_ARGS__})
#endif

/* What came so many steps before each of x[k]; `before` is the window before x. */
#define VECTOR(before, x, k) ((k) < 0 ? (before)[COUNT + (k)] : (x)[k])
#define BACK(before, x, k, steps)                                                                                  \
    ((steps) % LANES ? SHUFFLE(VECTOR(before, x, (k) - 1), (x)[k], RUN(LANES - (steps) % LANES))                   \
                     : VECTOR(before, x, (k) - (steps) / LANES))

INLINE Doubles OWN(load)(const void *from, const Dtype dtype)
{
    const float *x = from;
    Doubles whole;
    if (dtype == FLOAT32) /* of this GCC makes one instruction, of a conversion of vectors four */
        return (Doubles){EACH(x)};
    memcpy(&whole, from, sizeof whole);
    return whole;
}

INLINE void OWN(store)(void *to, const Doubles *x, const Dtype dtype)
{
    if (dtype == FLOAT32) {
        const Floats narrow = __builtin_convertvector(*x, Floats);
        memcpy(to, &narrow, sizeof narrow);
    } else
        memcpy(to, x, sizeof *x);
}

/* The last window: its values, its sums over 2, 4 and 8 steps, and over all that came before. */
typedef struct {
    Doubles one[COUNT], two[COUNT], four[COUNT], eight[COUNT], sums[COUNT];
} Windows;

/* After `sum`, which stands for all that came before, one step before the first. */
INLINE void OWN(begin)(Windows *w, double sum)
{
    memset(w, 0, sizeof *w);
    w->one[COUNT - 1][LANES - 1] = w->two[COUNT - 1][LANES - 1] = w->four[COUNT - 1][LANES - 1] = sum;
    w->eight[COUNT - 1][LANES - 1] = w->sums[COUNT - 1][LANES - 1] = sum;
}

/* The next sixteen. */
INLINE void OWN(slide)(Windows *w, const Doubles *x, const Fading *fading)
{
    const double *keep = fading->keep, k1 = keep[1], k2 = keep[2], k4 = keep[4], k8 = keep[8];
    const double whole = fading->whole, lost = fading->lost;
    Doubles two[COUNT], four[COUNT], eight[COUNT];
    UNROLL
    for (int k = 0; k < COUNT; k++) {
        two[k] = x[k] + k1 * BACK(w->one, x, k, 1);
        four[k] = two[k] + k2 * BACK(w->two, two, k, 2);
        eight[k] = four[k] + k4 * BACK(w->four, four, k, 4);
        w->sums[k] = whole * w->sums[k] + ((eight[k] + k8 * BACK(w->eight, eight, k, 8)) - lost * w->sums[k]);
    }
    UNROLL
    for (int k = 0; k < COUNT; k++)
        w->one[k] = x[k], w->two[k] = two[k], w->four[k] = four[k], w->eight[k] = eight[k];
}

/* The sum after the last step; NaN where it, or that after another of the last sixteen, is not finite: the sums of
   steps that lie apart by less are not made of each other. */
INLINE double OWN(end_of)(const Windows *w)
{
    double none = 0.0;
    for (int i = 0; i < WINDOW; i++)
        none += 0.0 * w->sums[i / LANES][i % LANES];
    return none == 0.0 ? w->sums[COUNT - 1][LANES - 1] : NAN;
}

INLINE double OWN(line)(
    char *restrict to, const char *restrict from, int n, double base, double sum, const double *restrict post,
    const Fading *fading, const Dtype dtype)
{
    const int size = (int)size_of(dtype);
    const Fading near = *fading;
    Windows w;
    OWN(begin)(&w, sum);
    for (int i = 0; i < n; i += WINDOW) {
        Doubles x[COUNT];
        fetch(from + i * size + AHEAD, WINDOW * size);
        UNROLL
        for (int k = 0; k < COUNT; k++)
            x[k] = OWN(load)(from + (i + k * LANES) * size, dtype) - base;
        OWN(slide)(&w, x, &near);
        UNROLL
        for (int k = 0; k < COUNT; k++) {
            const int place = i + k * LANES;
            const Doubles y = post ? base + OWN(load)(post + place, FLOAT64) * w.sums[k] : w.sums[k];
            OWN(store)(to + place * size, &y, dtype);
        }
    }
    return OWN(end_of)(&w);
}

/* The spread of the values around the mean before each; counts those that the mean hides. */
INLINE void OWN(spread)(
    double *restrict rises, double *restrict spreads, const double *restrict u, int n, const double *restrict post,
    const Fading *fading, State *state)
{
    const Fading near = *fading;
    Windows mean, spread;
    Doubles before[COUNT] = {{0}};
    Places hidden = {0};
    before[COUNT - 1][LANES - 1] = state->rise;
    OWN(begin)(&mean, state->sum);
    OWN(begin)(&spread, state->spread);
    for (int i = 0; i < n; i += WINDOW) {
        Doubles x[COUNT], rise[COUNT];
        UNROLL
        for (int k = 0; k < COUNT; k++)
            x[k] = OWN(load)(u + i + k * LANES, FLOAT64);
        OWN(slide)(&mean, x, &near);
        UNROLL
        for (int k = 0; k < COUNT; k++) {
            const Doubles share = OWN(load)(post + i + k * LANES, FLOAT64);
            rise[k] = share * mean.sums[k];
            const Doubles distance = x[k] - BACK(before, rise, k, 1);
            hidden -= HIDDEN * HIDDEN * distance * distance < rise[k] * rise[k];
            x[k] = distance * ((1.0 - share) * distance);
        }
        OWN(slide)(&spread, x, &near);
        UNROLL
        for (int k = 0; k < COUNT; k++) {
            before[k] = rise[k];
            OWN(store)(rises + i + k * LANES, &rise[k], FLOAT64);
            OWN(store)(spreads + i + k * LANES, &spread.sums[k], FLOAT64);
        }
    }
    for (int k = 0; k < LANES; k++)
        state->hidden += (double)hidden[k];
    state->rise = before[COUNT - 1][LANES - 1];
    state->sum = OWN(end_of)(&mean);
    state->spread = OWN(end_of)(&spread);
}

/* A line without writing anything. */
INLINE double OWN(reach)(
    const char *restrict from, ptrdiff_t n, double base, double sum, const Fading *fading, const Dtype dtype)
{
    const double whole = fading->whole, lost = fading->lost;
    const int size = (int)size_of(dtype), half = WINDOW / 2;
    Doubles sums[COUNT] = {{0}};
    sums[COUNT - 1][LANES - 1] = sum;
    for (; n >= WINDOW; n -= WINDOW, from += WINDOW * size) {
        fetch(from + AHEAD, WINDOW * size);
        UNROLL
        for (int k = 0; k < COUNT; k++)
            sums[k] = whole * sums[k] + ((OWN(load)(from + k * LANES * size, dtype) - base) - lost * sums[k]);
    }
    double total = 0.0;
    for (int i = 0; i < half; i++)
        total += fading->keep[WINDOW - 1 - i] * sums[i / LANES][i % LANES]
            + fading->keep[half - 1 - i] * sums[(half + i) / LANES][i % LANES];
    return total;
}

#undef JOIN
#undef JOINED
#undef OWN
#undef COUNT
#undef RUN
#undef EACH
#undef Doubles
#undef Floats
#undef Places
#undef Windows
#undef SHUFFLE
#undef VECTOR
#undef BACK
