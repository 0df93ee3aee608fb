/* Running means along time, of many series at once, in one pass over memory.

       S[t] = S[t-1] + (pre[t] * (x[t] - base) - lost[t] * S[t-1])        out[t] = base + post[t] * S[t]

   All arithmetic is in float64. Two ways, by how a series lies in memory:

   A line, whose steps lie side by side, is cut into blocks that stay in the nearest cache. What a block is given is
   summed over windows of 4, then of 16 steps, each value as faded as it then is; and every 16th sum is one recurrence,
   so 16 of them go on side by side. These are plain loops that compilers turn into vectors, the same operations in the
   same order for every instruction set.

   Of columns, whose neighbours lie side by side, a strip takes one step after the other.

   Large work is shared by threads: series, strips; or, of few long series, segments of time, where each thread finds
   what it starts from by reading as much of the past as still counts. */

#include "native.h"

#ifdef MANY_INSTRUCTION_SETS
#include <immintrin.h>
#endif

/* Steps of a block (not a power of two: what lies 4096 bytes apart is in the processor's way) and of a window; columns of a strip; bytes of a result from which on it goes around the caches;
   elements from which on threads are worth waking; how many bits of the past count to who reads it up again. */
enum { BLOCK = 384, WINDOW = 16, STRIP = 1024, AROUND = 1 << 24, LARGE = 1 << 20, BITS = 64 };

/* One number, or one for each step. */
typedef struct {
    const double *each;
    double value;
} Factor;

typedef struct {
    char *data;
    Dtype dtype;
    ptrdiff_t step[3]; /* in elements, along (outer, n, inner) */
} Plane;

/* How windows fade: `keep[k]` is what is left after k steps, and of a window `whole * S - lost * S`: one of both 0 or 1,
   whichever is more precise. */
typedef struct {
    double keep[WINDOW + 1], whole, lost;
} Fading;

typedef enum { LINES, STRIPS, SEGMENTS } Way;

typedef struct {
    Plane x, out;
    ptrdiff_t outer, n, inner;
    double *base, *sums; /* of each series */
    Factor lost, kept, pre, post;
    Fading fading;
    int fresh;  /* begins at its first value, which then is the base */
    int around; /* whether results go around the caches */
    Way way;
    ptrdiff_t each, series; /* how much a part takes: series, columns, steps; of which series, where these are steps */
    double *begins, *ends;  /* S before and after each segment */
    size_t unfinished;      /* how many series did not stay finite */
} Sweep;

INLINE char *element(const Plane *plane, ptrdiff_t row, ptrdiff_t time, ptrdiff_t column)
{
    const ptrdiff_t place = row * plane->step[0] + time * plane->step[1] + column * plane->step[2];
    return plane->data + place * (ptrdiff_t)size_of(plane->dtype);
}

INLINE double at(const Factor *factor, ptrdiff_t t) { return factor->each ? factor->each[t] : factor->value; }

/* The loops, each compiled once for every instruction set. Steps of 1 and -1 are told to the compiler, which has vectors
   for them. */

INLINE void write_double(void *to, ptrdiff_t i, double x, Dtype dtype)
{
    switch (dtype) {
    case FLOAT32: ((float *)to)[i] = (float)x; break;
    case FLOAT64: ((double *)to)[i] = x; break;
    case BFLOAT16: ((uint16_t *)to)[i] = bfloat_of((float)x); break;
    default: ((uint16_t *)to)[i] = half_of((float)x);
    }
}

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

INLINE void read_block(double *restrict u, const char *from, int n, ptrdiff_t step, double base, Dtype dtype)
{
    switch (dtype) {
    case FLOAT32: read_steps(u, from, n, step, base, FLOAT32); break;
    case FLOAT64: read_steps(u, from, n, step, base, FLOAT64); break;
    case BFLOAT16: read_steps(u, from, n, step, base, BFLOAT16); break;
    default: read_steps(u, from, n, step, base, FLOAT16);
    }
}

INLINE void write_steps(
    char *to, const double *restrict y, int n, ptrdiff_t step, double base, double post, const Dtype dtype)
{
    const ptrdiff_t size = (ptrdiff_t)size_of(dtype);
    if (step == 1) {
        INDEPENDENT
        for (int i = 0; i < n; i++)
            write_double(to, i, base + post * y[i], dtype);
    } else if (step == -1) {
        INDEPENDENT
        for (int i = 0; i < n; i++)
            write_double(to, -i, base + post * y[i], dtype);
    } else
        for (int i = 0; i < n; i++)
            write_double(to + i * step * size, 0, base + post * y[i], dtype);
}

INLINE void write_block(
    char *to, const double *restrict y, int n, ptrdiff_t step, double base, double post, Dtype dtype)
{
    switch (dtype) {
    case FLOAT32: write_steps(to, y, n, step, base, post, FLOAT32); break;
    case FLOAT64: write_steps(to, y, n, step, base, post, FLOAT64); break;
    case BFLOAT16: write_steps(to, y, n, step, base, post, BFLOAT16); break;
    default: write_steps(to, y, n, step, base, post, FLOAT16);
    }
}

/* Copies whole cache lines without fetching first what they held. */
INLINE void copy_lines(char *to, const char *from, size_t size, void (*copy_line)(char *to, const char *from))
{
    enum { LINE = 64 };
    const size_t ahead = (size_t)(-(uintptr_t)to % LINE), head = ahead < size ? ahead : size;
    size_t done = head;
    memcpy(to, from, head);
    for (; size - done >= LINE; done += LINE)
        copy_line(to + done, from + done);
    memcpy(to + done, from + done, size - done);
}

#ifdef MANY_INSTRUCTION_SETS
TARGET_AVX512 INLINE void copy_line_avx512(char *to, const char *from)
{
    _mm512_stream_si512((void *)to, _mm512_loadu_si512(from));
}

TARGET_AVX2 INLINE void copy_line_avx2(char *to, const char *from)
{
    for (int k = 0; k < 64; k += 32)
        _mm256_stream_si256((__m256i *)(to + k), _mm256_loadu_si256((const __m256i *)(from + k)));
}
#endif

INLINE void copy_line_baseline(char *to, const char *from)
{
#ifdef MANY_INSTRUCTION_SETS
    for (int k = 0; k < 64; k += 16)
        _mm_stream_si128((__m128i *)(to + k), _mm_loadu_si128((const __m128i *)(from + k)));
#else
    memcpy(to, from, 64);
#endif
}

/* Windows of 4, then of 16, then every 16th. u, v and y have room for a window before them, and S stands there as what
   came one step before. */
INLINE double fade(double *restrict u, double *restrict v, double *restrict y, int n, double sum, const Fading *fading)
{
    const double *keep = fading->keep, whole = fading->whole, lost = fading->lost;
    const double k1 = keep[1], k2 = keep[2], k3 = keep[3], k4 = keep[4], k8 = keep[8], k12 = keep[12];
    double last[WINDOW] = {0.0};
    for (int i = 1; i < WINDOW; i++)
        u[-1 - i] = v[-1 - i] = 0.0;
    u[-1] = v[-1] = last[WINDOW - 1] = sum;
    const int padded = (n + WINDOW - 1) / WINDOW * WINDOW;
    for (int i = n; i < padded; i++)
        u[i] = 0.0;
    for (int i = 0; i < padded; i++)
        v[i] = (u[i] + k1 * u[i - 1]) + (k2 * u[i - 2] + k3 * u[i - 3]);
    if (whole == 1.0)
        for (int i = 0; i < padded; i += WINDOW)
            for (int k = 0; k < WINDOW; k++) {
                const double window = (v[i + k] + k4 * v[i + k - 4]) + (k8 * v[i + k - 8] + k12 * v[i + k - 12]);
                y[i + k] = last[k] = (last[k] + window) - lost * last[k];
            }
    else
        for (int i = 0; i < padded; i += WINDOW)
            for (int k = 0; k < WINDOW; k++) {
                const double window = (v[i + k] + k4 * v[i + k - 4]) + (k8 * v[i + k - 8] + k12 * v[i + k - 12]);
                y[i + k] = last[k] = whole * last[k] + window;
            }
    return y[n - 1];
}

/* One step of a strip of columns. */
INLINE void step_columns(
    void *to, const void *from, int n, double *restrict sums, const double *restrict base, double lost, double kept,
    double pre, double post, const Dtype to_dtype, const Dtype from_dtype)
{
    if (lost <= 0.5) {
        INDEPENDENT
        for (int i = 0; i < n; i++) {
            const double u = pre * (read_double(from, i, from_dtype) - base[i]);
            sums[i] = sums[i] + (u - lost * sums[i]);
            write_double(to, i, base[i] + post * sums[i], to_dtype);
        }
    } else {
        INDEPENDENT
        for (int i = 0; i < n; i++) {
            const double u = pre * (read_double(from, i, from_dtype) - base[i]);
            sums[i] = kept * sums[i] + u;
            write_double(to, i, base[i] + post * sums[i], to_dtype);
        }
    }
}

/* All steps of a strip, some columns at a time. `same` is the dtype of x and out, where those are float32 or float64
   alike. */
INLINE void strip_steps(
    const Sweep *sweep, ptrdiff_t row, ptrdiff_t column, int width, double *sums, const double *base, int alike,
    const Dtype same, void (*copy_line)(char *to, const char *from))
{
    const Plane *x = &sweep->x, *out = &sweep->out;
    double room[BLOCK], result[BLOCK];
    for (ptrdiff_t t = 0; t < sweep->n; t++) {
        const double lost = at(&sweep->lost, t), kept = sweep->kept.each ? sweep->kept.each[t] : 1.0 - lost;
        const double pre = at(&sweep->pre, t), post = at(&sweep->post, t);
        for (int k = 0; k < width; k += BLOCK) {
            const int n = width - k < BLOCK ? width - k : BLOCK;
            const char *from = element(x, row, t, column + k);
            char *to = element(out, row, t, column + k), *place = sweep->around ? (char *)result : to;
            if (alike)
                step_columns(place, from, n, sums + k, base + k, lost, kept, pre, post, same, same);
            else {
                read_block(room, from, n, 1, 0.0, x->dtype);
                step_columns(room, room, n, sums + k, base + k, lost, kept, pre, post, FLOAT64, FLOAT64);
                write_block(place, room, n, 1, 0.0, 1.0, out->dtype);
            }
            if (sweep->around)
                copy_lines(to, place, (size_t)n * size_of(out->dtype), copy_line);
        }
    }
}

INLINE void strip_block(
    const Sweep *sweep, ptrdiff_t row, ptrdiff_t column, int width, double *sums, const double *base,
    void (*copy_line)(char *to, const char *from))
{
    const Dtype dtype = sweep->x.dtype;
    if (dtype == FLOAT32 && sweep->out.dtype == FLOAT32)
        strip_steps(sweep, row, column, width, sums, base, 1, FLOAT32, copy_line);
    else if (dtype == FLOAT64 && sweep->out.dtype == FLOAT64)
        strip_steps(sweep, row, column, width, sums, base, 1, FLOAT64, copy_line);
    else
        strip_steps(sweep, row, column, width, sums, base, 0, FLOAT64, copy_line);
}

typedef struct {
    void (*read)(double *u, const char *from, int n, ptrdiff_t step, double base, Dtype dtype);
    void (*write)(char *to, const double *y, int n, ptrdiff_t step, double base, double post, Dtype dtype);
    double (*fade)(double *u, double *v, double *y, int n, double sum, const Fading *fading);
    void (*strip)(
        const Sweep *sweep, ptrdiff_t row, ptrdiff_t column, int width, double *sums, const double *base);
    void (*copy)(char *to, const char *from, size_t size);
} Loops;

#define COMPILE(version, TARGET)                                                                                   \
    TARGET static void read_##version(                                                                             \
        double *u, const char *from, int n, ptrdiff_t step, double base, Dtype dtype)                              \
    {                                                                                                              \
        read_block(u, from, n, step, base, dtype);                                                                 \
    }                                                                                                              \
    TARGET static void write_##version(                                                                            \
        char *to, const double *y, int n, ptrdiff_t step, double base, double post, Dtype dtype)                   \
    {                                                                                                              \
        write_block(to, y, n, step, base, post, dtype);                                                            \
    }                                                                                                              \
    TARGET static double fade_##version(double *u, double *v, double *y, int n, double sum, const Fading *fading)  \
    {                                                                                                              \
        return fade(u, v, y, n, sum, fading);                                                                      \
    }                                                                                                              \
    TARGET static void strip_##version(                                                                            \
        const Sweep *sweep, ptrdiff_t row, ptrdiff_t column, int width, double *sums, const double *base)          \
    {                                                                                                              \
        strip_block(sweep, row, column, width, sums, base, copy_line_##version);                                   \
    }                                                                                                              \
    TARGET static void copy_##version(char *to, const char *from, size_t size)                                     \
    {                                                                                                              \
        copy_lines(to, from, size, copy_line_##version);                                                           \
    }

COMPILE(baseline, )
#ifdef MANY_INSTRUCTION_SETS
COMPILE(avx2, TARGET_AVX2)
COMPILE(avx512, TARGET_AVX512)
#endif

static const Loops LOOPS[] = {
#ifdef MANY_INSTRUCTION_SETS
    [AVX512] = {read_avx512, write_avx512, fade_avx512, strip_avx512, copy_avx512},
    [AVX2] = {read_avx2, write_avx2, fade_avx2, strip_avx2, copy_avx2},
#endif
    [BASELINE] = {read_baseline, write_baseline, fade_baseline, strip_baseline, copy_baseline},
};

/* Lines. */

/* Where each step loses another share: one after the other. */
INLINE double fade_unequally(
    const double *restrict u, double *restrict y, int n, double sum, const double *lost, const double *kept)
{
    for (int i = 0; i < n; i++)
        y[i] = sum = kept && lost[i] > 0.5 ? kept[i] * sum + u[i] : sum + (u[i] - lost[i] * sum);
    return sum;
}

/* The steps from `begin` to `end` of one series, from the sum before them; gives the sum after them. */
static double line(
    const Sweep *sweep, ptrdiff_t row, ptrdiff_t column, ptrdiff_t begin, ptrdiff_t end, double base, double sum,
    int writes)
{
    const Loops *loops = &LOOPS[chosen];
    const Plane *x = &sweep->x, *out = &sweep->out;
    const ptrdiff_t step = out->step[1], size = (ptrdiff_t)size_of(out->dtype);
    double room[3][WINDOW + BLOCK], result[BLOCK];
    double *u = room[0] + WINDOW, *v = room[1] + WINDOW, *y = room[2] + WINDOW;
    for (ptrdiff_t t = begin; t < end; t += BLOCK) {
        const int n = end - t < BLOCK ? (int)(end - t) : BLOCK;
        loops->read(u, element(x, row, t, column), n, x->step[1], base, x->dtype);
        if (sweep->pre.each || sweep->pre.value != 1.0)
            for (int i = 0; i < n; i++)
                u[i] *= at(&sweep->pre, t + i);
        if (sweep->lost.each)
            sum = fade_unequally(u, y, n, sum, sweep->lost.each + t, sweep->kept.each ? sweep->kept.each + t : NULL);
        else
            sum = loops->fade(u, v, y, n, sum, &sweep->fading);
        if (!writes)
            continue;
        if (sweep->post.each)
            for (int i = 0; i < n; i++)
                y[i] *= sweep->post.each[t + i];
        const double post = sweep->post.each ? 1.0 : sweep->post.value;
        char *to = element(out, row, t, column);
        if (sweep->around && (step == 1 || step == -1)) {
            char *place = (char *)result + (step == 1 ? 0 : (n - 1) * size);
            loops->write(place, y, n, step, base, post, out->dtype);
            loops->copy(step == 1 ? to : to - (n - 1) * size, (char *)result, (size_t)(n * size));
        } else
            loops->write(to, y, n, step, base, post, out->dtype);
    }
    return sum;
}

static double first_of(const Sweep *sweep, ptrdiff_t row, ptrdiff_t column)
{
    return read_double(element(&sweep->x, row, 0, column), 0, sweep->x.dtype);
}

/* Where the steps of a series do not lie side by side, several take turns: the neighbours' lines are in the cache. */
static size_t lines(const Sweep *sweep, ptrdiff_t first, ptrdiff_t last)
{
    size_t unfinished = 0;
    const ptrdiff_t step = sweep->x.step[1];
    const ptrdiff_t turn = last - first == 1 || step == 1 || step == -1 ? sweep->n : BLOCK;
    for (ptrdiff_t t = 0; t < sweep->n; t += turn)
        for (ptrdiff_t series = first; series < last; series++) {
            const ptrdiff_t row = series / sweep->inner, column = series % sweep->inner;
            const ptrdiff_t end = sweep->n - t < turn ? sweep->n : t + turn;
            if (t == 0 && sweep->fresh) {
                sweep->base[series] = first_of(sweep, row, column);
                sweep->sums[series] = 0.0;
            }
            const double sum = line(sweep, row, column, t, end, sweep->base[series], sweep->sums[series], 1);
            sweep->sums[series] = sum;
            unfinished += end == sweep->n && !isfinite(sum);
        }
    return unfinished;
}

/* Segments of one series. */

static void segment(const Sweep *sweep, size_t index)
{
    const ptrdiff_t row = sweep->series / sweep->inner, column = sweep->series % sweep->inner;
    const ptrdiff_t begin = (ptrdiff_t)index * sweep->each;
    const ptrdiff_t end = sweep->n - begin < sweep->each ? sweep->n : begin + sweep->each;
    const double base = sweep->base[sweep->series];
    double sum = sweep->sums[sweep->series];
    if (begin > 0) {
        const double reach = ceil(BITS * log(2.0) / -log1p(-sweep->lost.value));
        const ptrdiff_t back = reach < (double)begin ? (ptrdiff_t)reach : begin;
        sum = line(sweep, row, column, begin - back, begin, base, back < begin ? 0.0 : sum, 0);
    }
    sweep->begins[index] = sum;
    sweep->ends[index] = line(sweep, row, column, begin, end, base, sum, 1);
}

/* Columns. */

static size_t strip(const Sweep *sweep, ptrdiff_t row, ptrdiff_t column, int width)
{
    double *base = sweep->base + row * sweep->inner + column, *sums = sweep->sums + row * sweep->inner + column;
    size_t unfinished = 0;
    for (int i = 0; sweep->fresh && i < width; i++) {
        base[i] = first_of(sweep, row, column + i);
        sums[i] = 0.0;
    }
    LOOPS[chosen].strip(sweep, row, column, width, sums, base);
    for (int i = 0; i < width; i++)
        unfinished += !isfinite(sums[i]);
    return unfinished;
}

/* One part of the work. */

static void sweep_part(void *work, size_t index)
{
    Sweep *sweep = work;
    size_t unfinished = 0;
    const ptrdiff_t begin = (ptrdiff_t)index * sweep->each;
    if (sweep->way == SEGMENTS)
        segment(sweep, index);
    else if (sweep->way == LINES) {
        const ptrdiff_t count = sweep->outer * sweep->inner;
        unfinished = lines(sweep, begin, count - begin < sweep->each ? count : begin + sweep->each);
    } else {
        const ptrdiff_t strips = (sweep->inner + sweep->each - 1) / sweep->each;
        const ptrdiff_t row = (ptrdiff_t)index / strips, column = (ptrdiff_t)index % strips * sweep->each;
        const ptrdiff_t width = sweep->inner - column < sweep->each ? sweep->inner - column : sweep->each;
        unfinished = strip(sweep, row, column, (int)width);
    }
    if (unfinished)
        ADD(&sweep->unfinished, unfinished);
#ifdef MANY_INSTRUCTION_SETS
    if (sweep->around)
        _mm_sfence();
#endif
}

/* One series after the other, each in as many segments as there are threads. What a segment began with was found by
   reading as far back as counts if the past was not much larger; where it was, the segment is done again. */
static void in_segments(Sweep *sweep, int threads)
{
    double begins[64], ends[64];
    const ptrdiff_t most = threads < 64 ? threads : 64, blocks = (sweep->n + BLOCK - 1) / BLOCK;
    sweep->way = SEGMENTS;
    sweep->each = (blocks + most - 1) / most * BLOCK;
    sweep->begins = begins;
    sweep->ends = ends;
    const size_t count = (size_t)((sweep->n + sweep->each - 1) / sweep->each);
    for (sweep->series = 0; sweep->series < sweep->outer * sweep->inner; sweep->series++) {
        double *sum = sweep->sums + sweep->series;
        if (sweep->fresh) {
            sweep->base[sweep->series] = first_of(sweep, sweep->series / sweep->inner, sweep->series % sweep->inner);
            *sum = 0.0;
        }
        share(sweep_part, sweep, count, threads);
        *sum = ends[0];
        for (size_t index = 1; index < count && isfinite(*sum); index++) {
            if (fabs(begins[index] - *sum) <= fabs(*sum) * 0x1p-40)
                *sum = ends[index];
            else {
                const ptrdiff_t row = sweep->series / sweep->inner, column = sweep->series % sweep->inner;
                const ptrdiff_t begin = (ptrdiff_t)index * sweep->each;
                const ptrdiff_t end = sweep->n - begin < sweep->each ? sweep->n : begin + sweep->each;
                *sum = line(sweep, row, column, begin, end, sweep->base[sweep->series], *sum, 1);
            }
        }
        sweep->unfinished += !isfinite(*sum);
    }
}

static void run(Sweep *sweep, int threads)
{
    const ptrdiff_t count = sweep->outer * sweep->inner, x_step = sweep->x.step[2], step = sweep->x.step[1];
    const int large = (double)count * (double)sweep->n >= LARGE;
    threads = large && threads > 1 ? threads : 1;
    sweep->around = (double)count * (double)sweep->n * (double)size_of(sweep->out.dtype) >= AROUND;
    const int simple = sweep->x.dtype == sweep->out.dtype && sweep->x.dtype <= FLOAT64;
    const int columns = sweep->inner >= (simple ? 8 : 32) && x_step == 1 && sweep->out.step[2] == 1 && step != 1 && step != -1;
    if (columns) {
        const ptrdiff_t wanted = (threads + sweep->outer - 1) / sweep->outer;
        const ptrdiff_t wide = ((sweep->inner + wanted - 1) / wanted + 15) / 16 * 16; /* whole cache lines */
        sweep->way = STRIPS;
        sweep->each = wide < STRIP ? wide : STRIP;
        share(sweep_part, sweep, (size_t)((sweep->inner + sweep->each - 1) / sweep->each * sweep->outer), threads);
    } else if (count < threads && !sweep->lost.each) {
        in_segments(sweep, threads);
    } else {
        const ptrdiff_t share_of_each = (count + 8 * threads - 1) / (8 * threads);
        sweep->way = LINES;
        sweep->each = threads == 1 || (step != 1 && step != -1) ? (count + threads - 1) / threads : share_of_each;
        share(sweep_part, sweep, (size_t)((count + sweep->each - 1) / sweep->each), threads);
    }
}

/* Where each element loses another share: plain loops, columns side by side. */

typedef struct {
    Plane u, lost, kept, out; /* `kept` without data where it is 1 - lost */
    ptrdiff_t outer, n, inner;
    double *sums;
    ptrdiff_t each; /* how many columns a part takes */
} Elements;

static void elements_part(void *work, size_t index)
{
    const Elements *elements = work;
    const ptrdiff_t strips = (elements->inner + elements->each - 1) / elements->each;
    const ptrdiff_t row = (ptrdiff_t)index / strips, begin = (ptrdiff_t)index % strips * elements->each;
    const ptrdiff_t end = elements->inner - begin < elements->each ? elements->inner : begin + elements->each;
    double *sums = elements->sums + row * elements->inner;
    for (ptrdiff_t t = 0; t < elements->n; t++) {
        const double *u = (const double *)element(&elements->u, row, t, 0);
        const double *lost = (const double *)element(&elements->lost, row, t, 0);
        const double *kept = elements->kept.data ? (const double *)element(&elements->kept, row, t, 0) : NULL;
        double *out = (double *)element(&elements->out, row, t, 0);
        for (ptrdiff_t i = begin; i < end; i++) {
            const double share = lost[i * elements->lost.step[2]], new = u[i * elements->u.step[2]], old = sums[i];
            const int most = kept && share > 0.5;
            sums[i] = most ? kept[i * elements->kept.step[2]] * old + new : old + (new - share * old);
            out[i * elements->out.step[2]] = sums[i];
        }
    }
}

/* What Python sees; _native.pyi says what it is for. */

static int fail(const char *what) { PyErr_SetString(PyExc_ValueError, what); return -1; }

static int read_plane(Plane *plane, const Py_buffer *view, const Sweep *sweep)
{
    const char *format = view->format ? view->format : "B";
    if (format[0] == '\0' || format[1] != '\0' || !strchr("fdhe", format[0]))
        return fail("scan: expected native float32, float64, float16, or the bits of bfloat16 as int16");
    plane->dtype = format[0] == 'f' ? FLOAT32 : format[0] == 'd' ? FLOAT64 : format[0] == 'h' ? BFLOAT16 : FLOAT16;
    const ptrdiff_t size = (ptrdiff_t)size_of(plane->dtype);
    if (view->ndim != 3 || view->shape[0] != sweep->outer || view->shape[1] != sweep->n
        || view->shape[2] != sweep->inner)
        return fail("scan: expected x and out of one shape, (outer, n, inner)");
    if ((uintptr_t)view->buf % (uintptr_t)size)
        return fail("scan: expected aligned memory");
    plane->data = view->buf;
    for (int k = 0; k < 3; k++) {
        if (view->strides[k] % size)
            return fail("scan: expected aligned memory");
        plane->step[k] = view->shape[k] > 1 ? view->strides[k] / size : 0;
    }
    return 0;
}

/* Where a plane's memory begins and ends. */
static void extent(const Py_buffer *view, uintptr_t *begin, uintptr_t *end)
{
    *begin = (uintptr_t)view->buf;
    *end = *begin + (size_t)view->itemsize;
    for (int k = 0; k < 3; k++) {
        const ptrdiff_t whole = (view->shape[k] - 1) * view->strides[k];
        *(whole < 0 ? begin : end) += (uintptr_t)whole;
    }
}

static int check_apart(const Py_buffer *x, const Py_buffer *out)
{
    uintptr_t x_begin, x_end, out_begin, out_end;
    extent(x, &x_begin, &x_end);
    extent(out, &out_begin, &out_end);
    return x_begin < out_end && out_begin < x_end ? fail("scan: expected out that shares no memory with x") : 0;
}

/* A float, None (0.0), or a vector of `count` float64; `view` is to be released where it has an object. */
static int read_factor(Factor *factor, PyObject *object, Py_buffer *view, ptrdiff_t count)
{
    factor->each = NULL;
    factor->value = 0.0;
    if (object == Py_None)
        return 0;
    if (PyFloat_Check(object)) {
        factor->value = PyFloat_AsDouble(object);
        return 0;
    }
    if (PyObject_GetBuffer(object, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0)
        return -1;
    if (!view->format || strcmp(view->format, "d") || view->len != count * (ptrdiff_t)sizeof(double))
        return fail("scan: expected a float, or one float64 for each step");
    factor->each = view->buf;
    return 0;
}

static int read_state(double **state, PyObject *object, Py_buffer *view, ptrdiff_t count)
{
    if (PyObject_GetBuffer(object, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | PyBUF_WRITABLE) < 0)
        return -1;
    if (!view->format || strcmp(view->format, "d") || view->len != count * (ptrdiff_t)sizeof(double))
        return fail("scan: expected bases and sums as float64, one for each series");
    *state = view->buf;
    return 0;
}

static void prepare_fading(Fading *fading, double lost)
{
    const double rate = log1p(-lost);
    fading->keep[0] = 1.0;
    for (int k = 1; k <= WINDOW; k++)
        fading->keep[k] = exp(k * rate);
    fading->lost = -expm1(WINDOW * rate);
    fading->whole = fading->lost <= 0.5 ? 1.0 : fading->keep[WINDOW];
}

enum { X, OUT, BASE, SUMS, LOST, KEPT, PRE, POST, VIEWS };

static int read_arguments(Sweep *sweep, PyObject *const objects[VIEWS], Py_buffer views[VIEWS])
{
    if (PyObject_GetBuffer(objects[X], &views[X], PyBUF_STRIDES | PyBUF_FORMAT) < 0
        || PyObject_GetBuffer(objects[OUT], &views[OUT], PyBUF_STRIDES | PyBUF_FORMAT | PyBUF_WRITABLE) < 0)
        return -1;
    if (views[X].ndim != 3)
        return fail("scan: expected x and out of one shape, (outer, n, inner)");
    sweep->outer = views[X].shape[0];
    sweep->n = views[X].shape[1];
    sweep->inner = views[X].shape[2];
    const ptrdiff_t count = sweep->outer * sweep->inner;
    if (read_plane(&sweep->x, &views[X], sweep) < 0 || read_plane(&sweep->out, &views[OUT], sweep) < 0)
        return -1;
    if (count && sweep->n && check_apart(&views[X], &views[OUT]) < 0)
        return -1;
    if (read_state(&sweep->base, objects[BASE], &views[BASE], count) < 0
        || read_state(&sweep->sums, objects[SUMS], &views[SUMS], count) < 0
        || read_factor(&sweep->lost, objects[LOST], &views[LOST], sweep->n) < 0
        || read_factor(&sweep->kept, objects[KEPT], &views[KEPT], sweep->n) < 0
        || read_factor(&sweep->pre, objects[PRE], &views[PRE], sweep->n) < 0
        || read_factor(&sweep->post, objects[POST], &views[POST], sweep->n) < 0)
        return -1;
    if (!sweep->lost.each && !(sweep->lost.value >= 0.0 && sweep->lost.value <= 1.0))
        return fail("scan: expected lost from 0 to 1");
    return 0;
}

static int read_elements(Elements *elements, PyObject *const objects[5], Py_buffer views[5])
{
    Plane *const planes[] = {&elements->u, &elements->lost, &elements->kept, &elements->out};
    Sweep sizes;
    for (int k = 0; k < 4; k++) {
        if (k == 2 && objects[k] == Py_None)
            continue;
        if (PyObject_GetBuffer(objects[k], &views[k], PyBUF_STRIDES | PyBUF_FORMAT | (k == 3 ? PyBUF_WRITABLE : 0)) < 0)
            return -1;
        if (k == 0) {
            if (views[0].ndim != 3)
                return fail("scan: expected arrays of one shape, (outer, n, inner)");
            sizes.outer = elements->outer = views[0].shape[0];
            sizes.n = elements->n = views[0].shape[1];
            sizes.inner = elements->inner = views[0].shape[2];
        }
        if (read_plane(planes[k], &views[k], &sizes) < 0)
            return -1;
        if (planes[k]->dtype != FLOAT64)
            return fail("scan: expected float64");
    }
    if (elements->outer && elements->n && elements->inner && check_apart(&views[0], &views[3]) < 0)
        return -1;
    return read_state(&elements->sums, objects[4], &views[4], elements->outer * elements->inner);
}

PyObject *py_scan_elements(PyObject *module, PyObject *arguments)
{
    PyObject *objects[5];
    Py_buffer views[5];
    Elements elements;
    int threads, read;
    memset(views, 0, sizeof views);
    memset(&elements, 0, sizeof elements);
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OOOOOi:scan_elements", &objects[0], &objects[1], &objects[2], &objects[3],
                          &objects[4], &threads))
        return NULL;
    read = read_elements(&elements, objects, views);
    if (read == 0 && elements.outer > 0 && elements.n > 0 && elements.inner > 0) {
        const ptrdiff_t strips = (threads + elements.outer - 1) / elements.outer;
        const ptrdiff_t wide = ((elements.inner + strips - 1) / strips + 7) / 8 * 8;
        elements.each = wide < STRIP ? wide : STRIP;
        const ptrdiff_t count = (elements.inner + elements.each - 1) / elements.each * elements.outer;
        Py_BEGIN_ALLOW_THREADS
        share(elements_part, &elements, (size_t)count, threads);
        Py_END_ALLOW_THREADS
    }
    for (int k = 0; k < 5; k++)
        if (views[k].obj)
            PyBuffer_Release(&views[k]);
    return read < 0 ? NULL : Py_NewRef(Py_None);
}

PyObject *py_scan(PyObject *module, PyObject *arguments)
{
    PyObject *objects[VIEWS];
    Py_buffer views[VIEWS];
    int threads, read;
    Sweep sweep;
    memset(views, 0, sizeof views);
    memset(&sweep, 0, sizeof sweep);
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OOOOOOOOpi:scan", &objects[X], &objects[OUT], &objects[BASE], &objects[SUMS],
                          &objects[LOST], &objects[KEPT], &objects[PRE], &objects[POST], &sweep.fresh, &threads))
        return NULL;
    read = read_arguments(&sweep, objects, views);
    if (read == 0 && sweep.outer > 0 && sweep.n > 0 && sweep.inner > 0) {
        if (!sweep.lost.each)
            prepare_fading(&sweep.fading, sweep.lost.value);
        Py_BEGIN_ALLOW_THREADS
        run(&sweep, threads);
        Py_END_ALLOW_THREADS
    }
    for (int k = 0; k < VIEWS; k++)
        if (views[k].obj)
            PyBuffer_Release(&views[k]);
    return read < 0 ? NULL : PyBool_FromLong(sweep.unfinished == 0);
}
