/* Results that go around the caches: whole lines of them are written without fetching first what those held. */

#include "around.h"

/* Bytes from which on results would push all else out of the caches. */
enum { AROUND = 1 << 24, LINE_SIZE = 64 };

int is_large(const Sweep *sweep)
{
    const double count = (double)sweep->outer * (double)sweep->n * (double)sweep->inner;
    return count * (double)size_of(sweep->out[0].dtype) >= AROUND;
}

#ifdef MANY_INSTRUCTION_SETS
void end_around(void) { _mm_sfence(); }

/* Where a stage begins and ends within a line of the cache, its neighbour will fetch that line all the same. */
void leave(Stage *stage)
{
    if (stage->size == 0)
        return;
    const char *from = (const char *)stage->room;
    const size_t ahead = -(uintptr_t)stage->to % LINE_SIZE, head = ahead < stage->size ? ahead : stage->size;
    const size_t whole = (stage->size - head) / LINE_SIZE * LINE_SIZE;
    memcpy(stage->to, from, head);
    write_around(stage->to + head, from + head, whole);
    memcpy(stage->to + head + whole, from + head + whole, stage->size - head - whole);
    stage->size = 0;
}

#else

void end_around(void) {}

void leave(Stage *stage)
{
    if (stage->size == 0)
        return;
    memcpy(stage->to, stage->room, stage->size);
    stage->size = 0;
}

#endif

/* To clear the room would cost a short series as much as its steps. */
void begin_stage(Stage *stage)
{
    stage->to = NULL;
    stage->size = 0;
}

/* Where to write `size` bytes, at most a block of doubles, that belong to `to`. */
char *enter(Stage *stage, char *to, size_t size)
{
    if (stage->to + stage->size != to || stage->size + size > sizeof stage->room) {
        leave(stage);
        stage->to = to;
    }
    stage->size += size;
    return (char *)stage->room + stage->size - size;
}
