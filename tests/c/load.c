/* What a server does to a library that lives in it: many threads, forks, small stacks, masks, want of threads and memory.
 * `load TEST [NUMBERS]` runs one test, prints one line of figures and returns 0 if the library stood it. */
#define _GNU_SOURCE
#include "deltanet.h"
#include "require.h"

#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* ---- memory that fails when asked to: calls of the C library's names come here first ------------------------------ */

#ifndef WITHOUT_FAULTS
extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

/* Of the thread that asked for them: what a pool's own threads allocate, and when, is rayon's. */
static _Thread_local bool faults;
static _Thread_local long calls_until_failure, failures;
static bool fails_from_then_on;
static size_t smallest; /* allocations below this never fail */

static bool fails_now(size_t size) {
    if (!faults || size < smallest) return false;
    long left = calls_until_failure--;
    if (left > 0 || (left < 0 && !fails_from_then_on)) return false;
    failures++;
    errno = ENOMEM;
    return true;
}

/* From the `at`th allocation on (0: the next one), that one alone or all. */
static void begin_faults(long at, bool rest) {
    fails_from_then_on = rest;
    failures = 0;
    calls_until_failure = at;
    faults = true;
}

static long end_faults(void) {
    faults = false;
    return failures;
}

void *malloc(size_t n) { return fails_now(n) ? NULL : __libc_malloc(n); }
void *calloc(size_t n, size_t m) { return fails_now(n * m) ? NULL : __libc_calloc(n, m); }
void *realloc(void *p, size_t n) { return fails_now(n) ? NULL : __libc_realloc(p, n); }
void *aligned_alloc(size_t a, size_t n) { return fails_now(n) ? NULL : __libc_memalign(a, n); }
int posix_memalign(void **p, size_t a, size_t n) {
    *p = fails_now(n) ? NULL : __libc_memalign(a, n);
    return *p ? 0 : ENOMEM;
}
#endif

/* ---- problems ----------------------------------------------------------------------------------------------------- */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double) t.tv_sec + 1e-9 * (double) t.tv_nsec;
}

static uint64_t draw(uint64_t *seed) {
    *seed += 0x9e3779b97f4a7c15u;
    uint64_t z = *seed;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

typedef struct {
    deltanet_params params;
    float *memory; /* all tensors, one after the other; outputs last */
    size_t floats, first_output;
    float *expected; /* the outputs' bits after a run on one thread */
} problem;

static float *lay(problem *p, deltanet_tensor *t, int64_t n0, int64_t n1, int64_t n2, int64_t n3) {
    size_t count = (size_t) (n0 * n1 * n2 * n3), first = p->floats;
    *t = (deltanet_tensor) { .data = p->memory ? p->memory + first : NULL, .ne = { n0, n1, n2, n3 },
        .nb = { 4, 4 * (size_t) n0, 4 * (size_t) (n0 * n1), 4 * (size_t) (n0 * n1 * n2) } };
    p->floats += count;
    return p->memory ? p->memory + first : NULL;
}

static void fill(float *to, size_t count, float low, float high, uint64_t *seed) {
    for (size_t i = 0; i < count; i++) to[i] = low + (high - low) * (float) (draw(seed) >> 40) / 16777216.0f;
}

/* Called twice: to count, and to lay out. `scale` multiplies state and v. */
static void describe(problem *p, int64_t s, int64_t hk, int64_t hv, int64_t t, int64_t b, float scale, uint64_t seed) {
    deltanet_params *d = &p->params;
    memset(d, 0, sizeof *d);
    d->struct_size = sizeof *d;
    p->floats = 0;
    float *q = lay(p, &d->q, s, hk, t, b), *k = lay(p, &d->k, s, hk, t, b), *v = lay(p, &d->v, s, hv, t, b);
    float *g = lay(p, &d->g, 1, hv, t, b), *beta = lay(p, &d->beta, 1, hv, t, b);
    float *state = lay(p, &d->state_in, s, s, hv, b);
    p->first_output = p->floats;
    lay(p, &d->out, s, hv, t, b);
    lay(p, &d->state_out, s, s, hv, b);
    d->qk_norm = 1;
    d->qk_norm_eps = 1e-6f;
    if (!p->memory) return;
    size_t keys = (size_t) (s * hk * t * b), values = (size_t) (s * hv * t * b), heads = (size_t) (hv * t * b);
    fill(q, keys, -1, 1, &seed);
    fill(k, keys, -1, 1, &seed);
    fill(v, values, -scale, scale, &seed);
    fill(g, heads, -0.1f, 0, &seed);
    fill(beta, heads, 0, 1, &seed);
    fill(state, (size_t) (s * s * hv * b), -scale, scale, &seed);
}

static void poison(problem *p) {
    memset(p->memory + p->first_output, 0xff, 4 * (p->floats - p->first_output));
}

static bool is_expected(const problem *p) {
    return memcmp(p->memory + p->first_output, p->expected, 4 * (p->floats - p->first_output)) == 0;
}

static bool is_poison(const problem *p) {
    const unsigned char *bytes = (const unsigned char *) (p->memory + p->first_output);
    for (size_t i = 0; i < 4 * (p->floats - p->first_output); i++)
        if (bytes[i] != 0xff) return false;
    return true;
}

static problem make_scaled(int64_t s, int64_t hk, int64_t hv, int64_t t, int64_t b, float scale, uint64_t seed) {
    problem p = { 0 };
    describe(&p, s, hk, hv, t, b, scale, seed);
    p.memory = malloc(4 * p.floats);
    REQUIRE(p.memory, "no memory for a problem");
    describe(&p, s, hk, hv, t, b, scale, seed);
    p.expected = malloc(4 * (p.floats - p.first_output));
    REQUIRE(p.expected, "no memory for a problem");
    poison(&p);
    REQUIRE(deltanet_run(&p.params, 1) == DELTANET_STATUS_OK, "the first run");
    memcpy(p.expected, p.memory + p.first_output, 4 * (p.floats - p.first_output));
    return p;
}

static problem make(int64_t s, int64_t hk, int64_t hv, int64_t t, int64_t b, uint64_t seed) {
    return make_scaled(s, hk, hv, t, b, 1, seed);
}

/* Mixed shapes: decoding, short prompts, batches, odd sizes. */
static problem make_mixed(unsigned which, uint64_t seed) {
    static const int64_t shapes[][5] = {
        { 64, 2, 4, 1, 1 }, { 128, 1, 2, 1, 4 }, { 32, 2, 6, 17, 2 }, { 16, 1, 3, 70, 1 }, { 80, 1, 1, 5, 1 }, { 64, 1, 2, 0, 2 },
    };
    const int64_t *n = shapes[which % (sizeof shapes / sizeof *shapes)];
    return make(n[0], n[1], n[2], n[3], n[4], seed);
}

static void release(problem *p) {
    free(p->memory);
    free(p->expected);
}

static void run(problem *p, uint32_t threads) {
    poison(p);
    REQUIRE(deltanet_run(&p->params, threads) == DELTANET_STATUS_OK, "%u threads", threads);
    REQUIRE(is_expected(p), "%u threads give other bits", threads);
}

static void run_parts(problem *p, uint32_t nth, void *scratch, size_t size) {
    poison(p);
    for (uint32_t ith = 0; ith < nth; ith++)
        REQUIRE(deltanet_run_part(&p->params, ith, nth, scratch, size) == DELTANET_STATUS_OK, "part %u of %u", ith, nth);
    REQUIRE(is_expected(p), "%u parts give other bits", nth);
}

static void *scratch_for(const problem *p, size_t *size) {
    REQUIRE(deltanet_scratch_size(&p->params, size) == DELTANET_STATUS_OK, "scratch size");
    void *scratch = malloc(*size);
    REQUIRE(scratch, "no memory for scratch");
    return scratch;
}

/* A line of /proc/self/status, in its own unit (kB for memory). */
static long status_of(const char *name) {
    FILE *file = fopen("/proc/self/status", "r");
    REQUIRE(file, "/proc/self/status cannot be read");
    char line[256];
    long value = -1;
    while (fgets(line, sizeof line, file))
        if (strncmp(line, name, strlen(name)) == 0 && line[strlen(name)] == ':') value = atol(line + strlen(name) + 1);
    fclose(file);
    REQUIRE(value >= 0, "no %s", name);
    return value;
}

/* Pools that were given up end their threads on their own time, which is long where CPUs are busy: looks until there are
 * at most so many, for 20 s. */
static long settled_threads(long most) {
    long threads = status_of("Threads");
    for (int i = 0; i < 1000 && threads > most; i++) {
        usleep(20000);
        threads = status_of("Threads");
    }
    return threads;
}

/* ---- the tests ---------------------------------------------------------------------------------------------------- */

enum { SHAPES = 6 };

typedef struct {
    uint64_t seed;
    double until;
    _Atomic long calls, refused;
} worker;

/* Runs, parts, questions and mistakes, mixed, until the time is over. */
static void *work(void *argument) {
    worker *w = argument;
    problem problems[SHAPES];
    for (unsigned i = 0; i < SHAPES; i++) problems[i] = make_mixed(i, draw(&w->seed));
    while (now() < w->until) {
        problem *p = &problems[draw(&w->seed) % SHAPES];
        switch (draw(&w->seed) % 4) {
            case 0: run(p, (uint32_t) (draw(&w->seed) % 6)); break;
            case 1: {
                size_t size;
                void *scratch = scratch_for(p, &size);
                run_parts(p, 1 + (uint32_t) (draw(&w->seed) % 5), scratch, size);
                free(scratch);
                break;
            }
            case 2: {
                REQUIRE(deltanet_supports(&p->params) == DELTANET_STATUS_OK, "supports");
                char words[200];
                REQUIRE(deltanet_describe(&p->params, words, sizeof words) == DELTANET_STATUS_OK, "describe");
                break;
            }
            default: {
                /* The message must be this thread's, whatever the others do wrong meanwhile. */
                deltanet_params wrong = p->params;
                wrong.head_map = 1000 + (uint32_t) (draw(&w->seed) % 1000000);
                char number[16];
                snprintf(number, sizeof number, " %u;", wrong.head_map);
                REQUIRE(deltanet_run(&wrong, 3) == DELTANET_STATUS_UNKNOWN_VALUE, "a wrong head map");
                REQUIRE(strstr(deltanet_last_error(), number), "the message is not about%s", number);
                w->refused++;
            }
        }
        w->calls++;
    }
    for (unsigned i = 0; i < SHAPES; i++) release(&problems[i]);
    return NULL;
}

static void start(pthread_t *thread, void *(*body)(void *), void *argument) {
    REQUIRE(pthread_create(thread, NULL, body, argument) == 0, "no thread");
}

static void test_threads(long count, long seconds) {
    worker *workers = calloc((size_t) count, sizeof *workers);
    pthread_t *threads = calloc((size_t) count, sizeof *threads);
    REQUIRE(workers && threads, "no memory");
    for (long i = 0; i < count; i++) {
        workers[i].seed = (uint64_t) (time(NULL) * 1000 + i);
        workers[i].until = now() + (double) seconds;
        start(&threads[i], work, &workers[i]);
    }
    long calls = 0, refused = 0, most = 0;
    for (long i = 0; i < count; i++) {
        long there = status_of("Threads");
        most = there > most ? there : most;
        pthread_join(threads[i], NULL);
        calls += workers[i].calls;
        refused += workers[i].refused;
    }
    /* Four pools are kept, of at most five threads here (or one a processor); their callers are one of them. */
    long kept = 4 * (sysconf(_SC_NPROCESSORS_ONLN) > 5 ? sysconf(_SC_NPROCESSORS_ONLN) : 5);
    long left = settled_threads(kept + 1) - 1;
    REQUIRE(left <= kept, "%ld threads are left", left);
    REQUIRE(calls > count && refused > 0, "%ld calls, %ld refused", calls, refused);
    printf("%ld host threads, %ld s: %ld calls, %ld of them refused, no wrong bit; %ld pool threads left\n", count, seconds,
           calls, refused, left);
    free(workers);
    free(threads);
}

static void test_cycles(long count) {
    /* The first measure waits until every number of threads had its pool. */
    enum { THREADS = 7, EVERY_POOL = SHAPES * THREADS };
    long memory = 0, threads = 0, first = count / 5 > EVERY_POOL ? count / 5 : EVERY_POOL;
    REQUIRE(count > first, "%ld cycles are too few", count);
    size_t live = 0;
    for (long i = 0; i < count; i++) {
        problem p = make_mixed((unsigned) i, (uint64_t) i);
        run(&p, (uint32_t) (i / SHAPES % THREADS));
        release(&p);
        if (i == first) threads = settled_threads(1 + 4 * 5), memory = status_of("VmRSS"), live = mallinfo2().uordblks;
    }
    long threads_after = settled_threads(threads + 6), memory_after = status_of("VmRSS");
    size_t live_after = mallinfo2().uordblks;
    /* Each new thread may get a heap of its own from the C library, and a pool more or less may be there. */
    REQUIRE(live_after <= live + (512 << 10), "%zu live bytes became %zu", live, live_after);
#ifndef WITHOUT_FAULTS /* with a detector at work, its own memory grows */
    REQUIRE(memory_after <= memory + 8192, "%ld kB became %ld kB", memory, memory_after);
#endif
    REQUIRE(threads_after <= threads + 6, "%ld threads became %ld", threads, threads_after);
    printf("%ld create/run cycles: %ld kB resident and %ld threads after %ld, %ld kB and %ld at the end\n", count, memory,
           threads, first, memory_after, threads_after);
}

static void *run_for_ever(void *argument) {
    worker *w = argument;
    problem p = make_mixed(2, w->seed);
    while (now() < w->until) run(&p, 1 + (uint32_t) (draw(&w->seed) % 6)), w->calls++;
    release(&p);
    return NULL;
}

/* A child that hangs is killed by its alarm. */
static void expect_child(pid_t child, const char *what) {
    int status;
    REQUIRE(waitpid(child, &status, 0) == child, "waitpid");
    REQUIRE(!WIFSIGNALED(status) || WTERMSIG(status) != SIGALRM, "%s: the child hangs", what);
    REQUIRE(WIFEXITED(status) && WEXITSTATUS(status) == 0, "%s: the child ended with %#x", what, (unsigned) status);
}

static void test_fork(long count) {
    worker workers[3];
    pthread_t threads[3];
    memset(workers, 0, sizeof workers);
    problem p = make_mixed(2, 1);
    run(&p, 3);
    for (int i = 0; i < 3; i++) {
        workers[i].seed = (uint64_t) i;
        workers[i].until = now() + 1e6;
        start(&threads[i], run_for_ever, &workers[i]);
    }
    for (long i = 0; i < count; i++) {
        pid_t child = fork();
        REQUIRE(child >= 0, "fork");
        if (child == 0) {
            alarm(60);
            run(&p, 3);
            run(&p, 2);
            size_t size;
            void *scratch = scratch_for(&p, &size);
            run_parts(&p, 4, scratch, size);
            if (i % 8 == 0) {
                /* And its child, in turn. */
                pid_t grandchild = fork();
                if (grandchild == 0) {
                    alarm(60);
                    run(&p, 3);
                    _exit(0);
                }
                expect_child(grandchild, "fork in a fork");
            }
            _exit(0);
        }
        expect_child(child, "fork");
    }
    run(&p, 3);
    long calls = 0;
    for (int i = 0; i < 3; i++) {
        calls += workers[i].calls;
        REQUIRE(workers[i].calls > 0, "thread %d did nothing", i);
    }
    printf("%ld forks while 3 threads made %ld runs: every child ran on fresh pools\n", count, calls);
    fflush(stdout);
    _exit(0);
}

static double time_runs(problem *p, uint32_t threads, int count) {
    run(p, threads);
    double best = 1e9;
    for (int i = 0; i < count; i++) {
        double start = now();
        run(p, threads);
        double took = now() - start;
        best = took < best ? took : best;
    }
    return best;
}

/* ---- control groups: the older hierarchy of the cpu controller, or the one of all controllers ---------------------- */

static bool write_text(const char *folder, const char *file, const char *text) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, file);
    int to = open(path, O_WRONLY | O_CLOEXEC);
    if (to < 0) return false;
    bool written = write(to, text, strlen(text)) == (ssize_t) strlen(text);
    close(to);
    return written;
}

/* This process' group in the hierarchy that limits CPU time; `all` tells which it is. */
static bool cpu_group(char *folder, size_t size, bool *all) {
    FILE *file = fopen("/proc/self/cgroup", "r");
    char line[512];
    bool found = false;
    while (file && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        char *controllers = strchr(line, ':'), *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group) continue;
        *group++ = 0;
        controllers++;
        if (strcmp(controllers, "cpu") == 0 || strcmp(controllers, "cpu,cpuacct") == 0) {
            snprintf(folder, size, "/sys/fs/cgroup/%s%s", controllers, group);
            *all = false;
            found = true;
            break;
        }
        if (*controllers == 0) {
            snprintf(folder, size, "/sys/fs/cgroup%s", group);
            *all = true;
            found = access(folder, X_OK) == 0;
        }
    }
    if (file) fclose(file);
    return found;
}

/* Whole CPUs of this very group, 0 for no limit that can be seen. */
static long cpu_limit(void) {
    char folder[512], path[600];
    bool all;
    double quota = -1, period = 1;
    if (!cpu_group(folder, sizeof folder, &all)) return 0;
    snprintf(path, sizeof path, "%s/%s", folder, all ? "cpu.max" : "cpu.cfs_quota_us");
    FILE *file = fopen(path, "r");
    if (file && fscanf(file, all ? "%lf %lf" : "%lf", &quota, &period) < 1) quota = -1;
    if (file) fclose(file);
    snprintf(path, sizeof path, "%s/cpu.cfs_period_us", folder);
    file = all ? NULL : fopen(path, "r");
    if (file && fscanf(file, "%lf", &period) < 1) quota = -1;
    if (file) fclose(file);
    return quota <= 0 || period <= 0 ? 0 : quota < period ? 1 : (long) (quota / period);
}

static double time_runs(problem *p, uint32_t threads, int count);

static void in_group(const char *folder) {
    char own[32];
    snprintf(own, sizeof own, "%d", (int) getpid());
    REQUIRE(write_text(folder, "cgroup.procs", own), "the group does not take us: %s", strerror(errno));
    problem p = make(64, 2, 8, 40, 2, 1);
    long before = status_of("Threads");
    run(&p, 0);
    REQUIRE(status_of("Threads") == before, "a limit of one CPU got %ld threads more", status_of("Threads") - before);
    double start = now(), alone = time_runs(&p, 1, 200), crowded = time_runs(&p, 8, 200);
    for (int i = 0; i < 400; i++) run(&p, (uint32_t) (i % 9));
    printf("control group with 1 CPU: no pool for n_threads 0; 8 threads take %.2f times one thread's time; %d runs in %.1f s\n",
           crowded / alone, 802, now() - start);
    fflush(stdout);
    release(&p);
}

static void expect_child(pid_t child, const char *what);

static void test_group(void) {
    char above[480] = "", folder[512];
    bool all = false, made = cpu_group(above, sizeof above, &all);
    snprintf(folder, sizeof folder, "%s/deltanet-load-%d", above, (int) getpid());
    made = made && mkdir(folder, 0700) == 0;
    bool limited = made && (all ? write_text(folder, "cpu.max", "100000 100000")
                                : write_text(folder, "cpu.cfs_period_us", "100000") && write_text(folder, "cpu.cfs_quota_us", "100000"));
    if (!limited) {
        printf("SKIPPED: no control group can be made here (%s: %s)\n", made ? "no cpu controller" : above, strerror(errno));
        if (made) rmdir(folder);
        return;
    }
    pid_t child = fork();
    REQUIRE(child >= 0, "fork");
    if (child == 0) {
        alarm(120);
        in_group(folder);
        _exit(0);
    }
    int status;
    REQUIRE(waitpid(child, &status, 0) == child, "waitpid");
    for (int i = 0; i < 50 && rmdir(folder) != 0; i++) usleep(20000);
    REQUIRE(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child in the group ended with %#x", (unsigned) status);
}

/* What n_threads 0 should mean where no control group has a limit; else what it may mean. */
static long one_per_processor(const cpu_set_t *mask) {
    long count = CPU_COUNT(mask), limit = cpu_limit();
    return limit > 0 && limit < count ? limit : count;
}

static void test_affinity(void) {
    problem p = make(64, 2, 8, 40, 2, 1);
    cpu_set_t all, one;
    REQUIRE(sched_getaffinity(0, sizeof all, &all) == 0, "no mask");
    size_t first = 0;
    while (!CPU_ISSET(first, &all)) first++;
    CPU_ZERO(&one);
    CPU_SET(first, &one);
    REQUIRE(sched_setaffinity(0, sizeof one, &one) == 0, "the mask cannot be set");
    long before = status_of("Threads");
    run(&p, 0);
    REQUIRE(status_of("Threads") == before, "a mask of one CPU got a pool of %ld threads", status_of("Threads") - before);
    double alone = time_runs(&p, 1, 20), crowded = time_runs(&p, 8, 20);
    REQUIRE(sched_setaffinity(0, sizeof all, &all) == 0, "the mask cannot be set back");
    /* The caller is one of a pool's threads. Of eight, seven are there. */
    run(&p, 0);
    long limit = one_per_processor(&all), threads = settled_threads(before + 7 + limit - 1) - before - 7 + 1;
    REQUIRE(threads == limit, "%d CPUs, limit %ld: %ld threads", CPU_COUNT(&all), limit, threads);
    printf("mask of 1 CPU: no pool for n_threads 0; 8 threads on it take %.2f times one thread's time; mask of %d: %ld threads\n",
           crowded / alone, CPU_COUNT(&all), threads);
    REQUIRE(crowded < 5 * alone, "8 threads on one CPU");
    release(&p);
}

typedef struct {
    int what;
    problem *p;
    void *scratch;
    size_t size;
} small_stack;

static void *call_on_small_stack(void *argument) {
    small_stack *s = argument;
    deltanet_params wrong = s->p->params;
    switch (s->what) {
        case 0: return deltanet_supports(&s->p->params) == DELTANET_STATUS_OK ? s : NULL;
        case 1: wrong.out.nb[0] = 0; return deltanet_supports(&wrong) == DELTANET_STATUS_OVERLAP ? s : NULL;
        case 2: return deltanet_run_part(&s->p->params, 0, 1, s->scratch, s->size) == DELTANET_STATUS_OK ? s : NULL;
        case 3: return deltanet_run(&s->p->params, 1) == DELTANET_STATUS_OK ? s : NULL;
        default: return deltanet_run(&s->p->params, 2) == DELTANET_STATUS_OK ? s : NULL;
    }
}

/* Calls on a thread whose stack we own, and counts how deep it was touched. */
static long stack_touched(small_stack *what, size_t size) {
    unsigned char *stack = mmap(NULL, size + 8192, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REQUIRE(stack != MAP_FAILED && mprotect(stack + 4096, size, PROT_READ | PROT_WRITE) == 0, "no stack");
    memset(stack + 4096, 0x5a, size);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    REQUIRE(pthread_attr_setstack(&attributes, stack + 4096, size) == 0, "a stack of %zu", size);
    pthread_t thread;
    REQUIRE(pthread_create(&thread, &attributes, call_on_small_stack, what) == 0, "no thread on %zu bytes", size);
    void *answer;
    pthread_join(thread, &answer);
    REQUIRE(answer, "call %d on a stack of %zu", what->what, size);
    size_t untouched = 0;
    while (untouched < size && stack[4096 + untouched] == 0x5a) untouched++;
    munmap(stack, size + 8192);
    return (long) (size - untouched);
}

static void test_stacks(size_t bytes) {
    static const int64_t shapes[][5] = { { 128, 2, 4, 1, 1 }, { 128, 2, 4, 100, 1 }, { 1024, 1, 1, 2, 1 }, { 1024, 1, 1, 40, 1 } };
    static const char *const names[] = { "supports", "a refusal", "run_part", "run on 1 thread", "run on 2 threads" };
    long most[5] = { 0 };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const int64_t *n = shapes[i];
        problem p = make(n[0], n[1], n[2], n[3], n[4], i);
        size_t size;
        void *scratch = scratch_for(&p, &size);
        for (int what = 0; what < 5; what++) {
            small_stack call = { what, &p, scratch, size };
            if (what >= 2) poison(&p);
            long touched = stack_touched(&call, bytes);
            most[what] = touched > most[what] ? touched : most[what];
            if (what >= 2) REQUIRE(is_expected(&p), "%s on a small stack gives other bits", names[what]);
        }
        free(scratch);
        release(&p);
    }
    printf("threads with a stack of %zu bytes; touched, thread set-up included:", bytes);
    for (int what = 0; what < 5; what++) printf(" %s %ld%s", names[what], most[what], what < 4 ? "," : "\n");
}

static void test_no_threads(void) {
    problem p = make(64, 2, 8, 40, 2, 1);
    /* The limit counts a user's threads and does not bind root. */
    if (getuid() == 0) REQUIRE(setresuid(65534, 65534, 65534) == 0, "setresuid");
    struct rlimit limit = { 1, 1000 }, before;
    REQUIRE(getrlimit(RLIMIT_NPROC, &before) == 0, "getrlimit");
    limit.rlim_max = before.rlim_max;
    REQUIRE(setrlimit(RLIMIT_NPROC, &limit) == 0, "setrlimit");
    long threads = status_of("Threads");
    for (uint32_t n = 2; n < 9; n++) {
        poison(&p);
        REQUIRE(deltanet_run(&p.params, n) == DELTANET_STATUS_OUT_OF_MEMORY, "%u threads that cannot be had", n);
        REQUIRE(strstr(deltanet_last_error(), "threads"), "words");
        REQUIRE(is_poison(&p), "a refused run wrote something");
        run(&p, 1);
    }
    REQUIRE(settled_threads(threads) == threads, "threads are left");
    REQUIRE(setrlimit(RLIMIT_NPROC, &before) == 0, "setrlimit back");
    run(&p, 4);
    printf("no threads to be had: OUT_OF_MEMORY, nothing written; one thread works on; 4 threads once they can be had\n");
    release(&p);
}

static void test_no_memory(void) {
    problem p = make(64, 2, 8, 40, 2, 1);
    /* One heap with room for small pieces, which threads of Rust's libraries cannot do without: stacks are what is short. */
    mallopt(M_ARENA_MAX, 1), mallopt(M_TRIM_THRESHOLD, 64 << 20);
    enum { PIECES = 256 };
    void *pieces[PIECES];
    for (int i = 0; i < PIECES; i++) pieces[i] = malloc(32 << 10);
    run(&p, 3);
    for (int i = 0; i < PIECES; i++) free(pieces[i]);
    struct rlimit limit, before;
    REQUIRE(getrlimit(RLIMIT_AS, &before) == 0, "getrlimit");
    limit = before;
    limit.rlim_cur = (rlim_t) status_of("VmSize") * 1024 + (1 << 20);
    REQUIRE(setrlimit(RLIMIT_AS, &limit) == 0, "setrlimit");
    /* A thread's stack is 2 MiB. */
    poison(&p);
    REQUIRE(deltanet_run(&p.params, 4) == DELTANET_STATUS_OUT_OF_MEMORY, "a pool without memory");
    REQUIRE(is_poison(&p), "a refused run wrote something");
    /* Then take what is left, in ever smaller pieces, and ask for the scratch of one thread. */
    void *taken = NULL;
    for (size_t size = 1 << 20; size >= 64; size /= 2) {
        for (void **block; (block = malloc(size)) != NULL;) {
            *block = taken;
            taken = block;
        }
    }
    /* One thread; a pool that is there; one that is not. */
    static const uint32_t threads[] = { 1, 3, 5 };
    deltanet_status statuses[3];
    char words[3][128] = { "" };
    bool untouched = true;
    for (int i = 0; i < 3; i++) {
        statuses[i] = deltanet_run(&p.params, threads[i]);
        untouched = untouched && is_poison(&p);
        strncpy(words[i], deltanet_last_error(), sizeof words[i] - 1);
    }
    while (taken) {
        void *next = *(void **) taken;
        free(taken);
        taken = next;
    }
    REQUIRE(setrlimit(RLIMIT_AS, &before) == 0, "setrlimit back");
    for (int i = 0; i < 3; i++)
        REQUIRE(statuses[i] == DELTANET_STATUS_OUT_OF_MEMORY, "%u threads without memory: %u", threads[i], statuses[i]);
    REQUIRE(untouched, "a refused run wrote something");
    run(&p, 1);
    run(&p, 4);
    printf("no memory to be had: OUT_OF_MEMORY with 1 thread (\"%s\"), a pool that is there and a new one, nothing written; "
           "works once there is\n",
           words[0]);
    release(&p);
}

#ifndef WITHOUT_FAULTS
/* Fails each allocation that a call makes on its thread, one after the other: first alone, then with all that follow. */
static long fail_each(problem *p, uint32_t threads, deltanet_params *params) {
    long at = 0;
    for (int rest = 0; rest < 2; rest++) {
        for (at = 0;; at++) {
            poison(p);
            begin_faults(at, rest);
            deltanet_status status = deltanet_run(params, threads);
            long failed = end_faults();
            REQUIRE(status != DELTANET_STATUS_INTERNAL, "a panic");
            if (failed == 0) break;
            if (status == DELTANET_STATUS_OK) REQUIRE(is_expected(p), "wrong bits");
            else REQUIRE(is_poison(p), "a refused run wrote something");
        }
    }
    return at;
}

/* The small pieces of a pool and its threads are allocated by code that cannot say no; what we ask for ourselves is
 * large, and reserved before. Fails each of these in turn, with a pool that is there or with new ones. */
static long fail_each_large(problem *p, bool fresh) {
    long at = 0;
    smallest = 8192;
    for (;; at++) {
        static uint32_t next;
        uint32_t threads = fresh ? 2 + next++ % 6 : 3; /* more sizes than are kept: each makes a pool */
        poison(p);
        begin_faults(at, false);
        deltanet_status status = deltanet_run(&p->params, threads);
        long failed = end_faults();
        REQUIRE(status == (failed ? DELTANET_STATUS_OUT_OF_MEMORY : DELTANET_STATUS_OK), "status %u", status);
        REQUIRE(failed ? is_poison(p) : is_expected(p), "outputs of a run with %ld failures", failed);
        if (failed == 0) break;
    }
    smallest = 0;
    return at;
}

static void test_faults(void) {
    problem p = make(64, 2, 8, 40, 2, 1);
    run(&p, 3);
    long pooled = fail_each_large(&p, false), fresh = fail_each_large(&p, true);
    REQUIRE(pooled >= 2 && fresh > pooled, "%ld and %ld large allocations", pooled, fresh);
    long run_alone = fail_each(&p, 1, &p.params);
    deltanet_params wrong = p.params;
    wrong.out.nb[1] = 4;
    long refusal = fail_each(&p, 1, &wrong);
    size_t size;
    void *scratch = scratch_for(&p, &size);
    begin_faults(0, true);
    deltanet_status part = deltanet_run_part(&p.params, 0, 1, scratch, size);
    deltanet_status asked = deltanet_supports(&p.params);
    long failed = end_faults();
    REQUIRE(part == DELTANET_STATUS_OK && asked == DELTANET_STATUS_OK && failed == 0, "run_part or supports allocates");
    printf("each allocation failed in turn: %ld of a run on one thread, %ld of a refusal; of those above 8 KiB, %ld on a pool "
           "that is there and %ld on a new one; run_part and supports make none\n",
           run_alone, refusal, pooled, fresh);
    free(scratch);
    release(&p);
}
#endif

/* How many times as long this processor takes for multiplications and additions of denormals. */
static double denormal_penalty(void) {
    static volatile float memory[4096];
    double seconds[2];
    for (int tiny = 0; tiny < 2; tiny++) {
        for (size_t i = 0; i < 4096; i++) memory[i] = tiny ? 1e-39f : 1.0f;
        seconds[tiny] = 1e9;
        for (int turn = 0; turn < 20; turn++) {
            double start = now();
            for (size_t i = 0; i < 4096; i++) memory[i] = memory[i] * 0.75f + memory[4095 - i] * 0.25f;
            double taken = now() - start;
            if (taken < seconds[tiny]) seconds[tiny] = taken;
        }
    }
    return seconds[1] / seconds[0];
}

static void test_denormals(void) {
    double penalty = denormal_penalty(), most = penalty > 2 ? 2 * penalty : 2;
    static const int64_t shapes[][5] = { { 128, 4, 8, 1, 1 }, { 128, 2, 4, 64, 1 }, { 64, 2, 4, 200, 1 } };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const int64_t *n = shapes[i];
        problem normal = make_scaled(n[0], n[1], n[2], n[3], n[4], 1, i);
        problem tiny = make_scaled(n[0], n[1], n[2], n[3], n[4], 1e-39f, i);
        double a = time_runs(&normal, 1, 60), b = time_runs(&tiny, 1, 60);
        double ratio = time_runs(&tiny, 1, 60) / time_runs(&normal, 1, 60);
        ratio = b / a < ratio ? b / a : ratio;
        REQUIRE(ratio <= most, "denormals take %.2f times as long, %.2f in a plain loop", ratio, penalty);
        printf("S %ld, T %ld: denormal state and values take %.2f times as long, %.2f in a plain loop\n", (long) n[0],
               (long) n[2 + 1], ratio, penalty);
        release(&normal);
        release(&tiny);
    }
}

int main(int count, char **words) {
    const char *test = count > 1 ? words[1] : "";
    long first = count > 2 ? atol(words[2]) : 0, second = count > 3 ? atol(words[3]) : 0;
    if (strcmp(test, "threads") == 0) test_threads(first, second);
    else if (strcmp(test, "cycles") == 0) test_cycles(first);
    else if (strcmp(test, "fork") == 0) test_fork(first);
    else if (strcmp(test, "affinity") == 0) test_affinity();
    else if (strcmp(test, "group") == 0) test_group();
    else if (strcmp(test, "stacks") == 0) test_stacks((size_t) first);
    else if (strcmp(test, "no-threads") == 0) test_no_threads();
    else if (strcmp(test, "no-memory") == 0) test_no_memory();
#ifndef WITHOUT_FAULTS
    else if (strcmp(test, "faults") == 0) test_faults();
#endif
    else if (strcmp(test, "denormals") == 0) test_denormals();
    else {
        fprintf(stderr, "load threads N SECONDS | cycles N | fork N | affinity | group | stacks BYTES | no-threads | no-memory | faults | "
                        "denormals\n");
        return 2;
    }
    return 0;
}
