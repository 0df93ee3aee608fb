/* Columns, whose neighbours lie side by side: a thread takes a strip of them through all steps, tile by tile. */

#include "around.h"

/* Fewer columns are lines; bytes of a line of the cache; columns of a strip at least, where threads share them; steps
   of a tile, where there are several side by side; how many steps before it is used a row is fetched. */
enum { FEWEST = 8, LINE_SIZE = 64, NARROW = 64, FEW = 4, AHEAD = 16 };

int has_strips(const Sweep *sweep)
{
    int beside = sweep->x.step[2] == 1 && sweep->x.step[1] != 1 && sweep->x.step[1] != -1;
    for (int k = 0; k < sweep->outs; k++)
        beside &= sweep->out[k].step[2] == 1;
    return beside && sweep->inner >= FEWEST;
}

/* What is of another dtype than x goes through float64. */
static void take_rows(const Sweep *sweep, ptrdiff_t row, ptrdiff_t column, Tile *tile, States *states)
{
    const LineLoops *loops = &LINE[chosen];
    double u[WIDE], y[OUTS][WIDE];
    Tile one = *tile;
    one.steps = 1, one.soon = 0, one.around = 0, one.from = (char *)u, one.dtype = FLOAT64;
    for (; tile->steps > 0; tile->steps--, one.time++, one.post++) {
        loops->read(u, element(&sweep->x, row, one.time, column), tile->width, 1, 0.0, sweep->x.dtype);
        for (int k = 0; k < sweep->outs; k++)
            one.to[k] = (char *)y[k];
        sweep->take(sweep, &one, states);
        for (int k = 0; k < sweep->outs; k++)
            loops->write(element(&sweep->out[k], row, one.time, column), y[k], tile->width, 1, 0.0, NULL,
                         sweep->out[k].dtype);
    }
}

static void take_tile(const Sweep *sweep, ptrdiff_t row, ptrdiff_t column, Tile *tile, States *states)
{
    const ptrdiff_t size = (ptrdiff_t)size_of(sweep->x.dtype);
    int alike = 1;
    tile->dtype = sweep->x.dtype;
    tile->from = element(&sweep->x, row, tile->time, column);
    tile->from_step = sweep->x.step[1] * size;
    tile->around = sweep->around && tile->width * size % WORD == 0;
    for (int k = 0; k < sweep->outs; k++) {
        tile->to[k] = element(&sweep->out[k], row, tile->time, column);
        tile->to_step[k] = sweep->out[k].step[1] * size;
        tile->around &= (uintptr_t)tile->to[k] % WORD == 0 && tile->to_step[k] % WORD == 0;
        alike &= sweep->out[k].dtype == sweep->x.dtype;
    }
    if (alike)
        sweep->take(sweep, tile, states);
    else
        take_rows(sweep, row, column, tile, states);
}

/* What is carried lies in memory of the thread's own: lines of the cache that threads share go to and fro. */
static size_t strip(const Sweep *sweep, ptrdiff_t row, ptrdiff_t begin, int all)
{
    const int width = all < WIDE ? all : WIDE;
    const int most = sweep->inner <= WIDE ? BLOCK : FEW; /* whatever the number of threads */
    const ptrdiff_t series = row * sweep->inner + begin;
    const size_t size = (size_t)all * sizeof(double);
    double shares[BLOCK];
    States states;
    memset(states.spread, 0, size);
    memset(states.hidden, 0, size);
    if (sweep->fresh)
        begin_strip(sweep, row, begin, all, &states);
    else {
        memcpy(states.base, sweep->base + series, size);
        memcpy(states.sum, sweep->sums + series, size);
    }
    for (ptrdiff_t t = 0; t < sweep->n; t += BLOCK) {
        const int n = sweep->n - t < BLOCK ? (int)(sweep->n - t) : BLOCK;
        const double *post = shares_of(&sweep->post, t, n, shares);
        for (int i = 0; i < n; i += most)
            for (int k = 0; k < all; k += width) {
                Tile tile = {.time = t + i, .column = k, .steps = n - i < most ? n - i : most, .post = post + i,
                             .width = all - k < width ? all - k : width, .soon = most < AHEAD ? most : AHEAD};
                take_tile(sweep, row, begin + k, &tile, &states);
            }
    }
    memcpy(sweep->sums + series, states.sum, size);
    size_t unfit = 0;
    for (int i = 0; i < all; i++) {
        const State state = {states.sum[i], 0.0, states.spread[i], states.hidden[i]};
        unfit += !is_fit(sweep, &state);
    }
    return unfit;
}

/* Strips begin with lines of the cache, where all rows of what is written do. */
static ptrdiff_t begin_of(const Sweep *sweep, ptrdiff_t index)
{
    const Plane *out = &sweep->out[0];
    const ptrdiff_t size = (ptrdiff_t)size_of(out->dtype), begin = index * sweep->each;
    const int alike = out->step[1] * size % LINE_SIZE == 0;
    const ptrdiff_t over = (ptrdiff_t)((uintptr_t)element(out, 0, 0, begin) % LINE_SIZE) / size;
    return begin >= sweep->inner ? sweep->inner : index && alike ? begin - over : begin;
}

static void one_strip(void *work, size_t index)
{
    Sweep *sweep = work;
    const ptrdiff_t strips = (sweep->inner + sweep->each - 1) / sweep->each;
    const ptrdiff_t row = (ptrdiff_t)index / strips, k = (ptrdiff_t)index % strips;
    const ptrdiff_t begin = begin_of(sweep, k), end = begin_of(sweep, k + 1);
    const size_t unfit = strip(sweep, row, begin, (int)(end - begin));
    end_around();
    if (unfit)
        ADD(&sweep->unfit, unfit);
}

void in_strips(Sweep *sweep, int threads)
{
    const ptrdiff_t wanted = (threads + sweep->outer - 1) / sweep->outer;
    const ptrdiff_t fair = (sweep->inner + wanted - 1) / wanted;
    const ptrdiff_t wide = (fair < NARROW ? NARROW : fair) + LINE_SIZE - 1, most = STRIP - LINE_SIZE;
    sweep->each = (wide < most ? wide : most) / LINE_SIZE * LINE_SIZE;
    share(one_strip, sweep, (size_t)((sweep->inner + sweep->each - 1) / sweep->each * sweep->outer), threads);
}
