/* Threads. Large work is cut into parts, which the caller and the pool's threads take one after the other. The threads
   sleep in between; they are made when first needed, and again in a forked child, which has none of its parent's. */

#include "native.h"

#if defined(__GNUC__) && !defined(_WIN32)
#include <pthread.h>
#include <signal.h>

typedef struct {
    Part *part;
    void *work;
    size_t count, next;
} Job;

static void take_parts(Job *job)
{
    for (size_t index; (index = ADD(&job->next, 1)) < job->count;)
        job->part(job->work, index);
}

static struct {
    pthread_mutex_t turn, lock; /* one job at a time; and for all that follows */
    pthread_cond_t wake, done;
    Job *job;
    int threads, seats, busy; /* how many there are; may still join the job; have not finished it */
} pool = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, PTHREAD_COND_INITIALIZER,
          NULL, 0, 0, 0};

static void begin_anew_in_child(void)
{
    pool.turn = pool.lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    pool.wake = pool.done = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    pool.threads = pool.seats = pool.busy = 0;
}

void prepare_threads(void) { pthread_atfork(NULL, NULL, begin_anew_in_child); }

static void *help(void *unused)
{
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (pool.seats == 0)
            pthread_cond_wait(&pool.wake, &pool.lock);
        pool.seats--;
        Job *job = pool.job;
        pthread_mutex_unlock(&pool.lock);
        take_parts(job);
        pthread_mutex_lock(&pool.lock);
        if (--pool.busy == 0)
            pthread_cond_signal(&pool.done);
    }
    return unused;
}

static void add_thread(void)
{
    sigset_t all, before;
    pthread_t thread;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for Python's threads */
    if (pthread_create(&thread, NULL, help, NULL) == 0) {
        pthread_detach(thread);
        pool.threads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Where another Python thread has the pool already, the caller does its own work alone. */
void share(Part *part, void *work, size_t count, int threads)
{
    Job job = {part, work, count, 0};
    if (threads < 2 || count < 2 || pthread_mutex_trylock(&pool.turn) != 0) {
        take_parts(&job);
        return;
    }
    pthread_mutex_lock(&pool.lock);
    for (int missing = threads - 1 - pool.threads; missing > 0; missing--)
        add_thread();
    pool.job = &job;
    pool.seats = pool.busy = pool.threads < threads - 1 ? pool.threads : threads - 1;
    if (pool.busy)
        pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    take_parts(&job);
    pthread_mutex_lock(&pool.lock);
    pool.busy -= pool.seats; /* those that did not wake in time are not waited for */
    pool.seats = 0;
    while (pool.busy)
        pthread_cond_wait(&pool.done, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.turn);
}

#else

void prepare_threads(void) {}

void share(Part *part, void *work, size_t count, int threads)
{
    (void)threads;
    for (size_t index = 0; index < count; index++)
        part(work, index);
}

#endif
