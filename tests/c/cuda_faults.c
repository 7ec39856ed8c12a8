/* What the CUDA functions do when the driver fails, is told nonsense or is not there, with the made-up libcuda of
 * fake_cuda.c: `cuda_faults TEST` runs one test, prints a line and returns 0 if every fault became a status with its words.
 * Kernels are not run; statuses, words and launches are what is compared. Device memory has addresses that nobody may
 * touch, so that a look at it from the host ends the program.
 * SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "deltanet.h"
#include "fake_cuda.h"
#include "require.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* A call's status, and a word that its message has to have. */
#define REFUSED(call, wanted, word)                                                                                 \
    do {                                                                                                            \
        deltanet_status got_ = (call);                                                                              \
        REQUIRE(got_ == (wanted), "status %s, want %s", deltanet_status_name(got_), deltanet_status_name(wanted));  \
        REQUIRE(strstr(deltanet_last_error(), word), "want the word %s", word);                                     \
    } while (0)
#define TAKEN(call) REQUIRE((call) == DELTANET_STATUS_OK, "refused")

enum { OK = DELTANET_STATUS_OK, CUDA = DELTANET_STATUS_CUDA, UNSUPPORTED = DELTANET_STATUS_UNSUPPORTED };
enum { OUT_OF_MEMORY = DELTANET_STATUS_OUT_OF_MEMORY };

static const fake_controls *fake;

static void find_driver(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    if (library) fake = dlsym(library, "fake_cuda");
    REQUIRE(fake, "the made-up libcuda was not found: is it first in LD_LIBRARY_PATH?");
}

/* ---- memory of the host that fails when asked to: calls of the C library's names come here first ----------------- */

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

static _Thread_local bool faults, fails_from_then_on;
static _Thread_local long until_failure, failures, allocations;
static _Thread_local size_t smallest; /* allocations below this never fail */

static bool fails_now(size_t size) {
    if (!faults) return false;
    allocations++;
    if (size < smallest) return false;
    long left = until_failure--;
    if (left > 0 || (left < 0 && !fails_from_then_on)) return false;
    failures++;
    errno = ENOMEM;
    return true;
}

static void begin_faults(long at, bool rest) {
    fails_from_then_on = rest, failures = 0, allocations = 0, until_failure = at, faults = true;
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

/* ---- problems ----------------------------------------------------------------------------------------------------- */

/* What is special about a problem. */
enum { PLAIN = 0, RAGGED = 1, POOL = 2, SNAPSHOTS = 4, VALUES_FIRST = 8, HALF = 16, CHANNEL_GATE = 32 };

typedef struct {
    deltanet_params params;
    void *workspace, *stream;
    size_t size;
} problem;

static deltanet_tensor tensor(uint32_t dtype, int place, int64_t n0, int64_t n1, int64_t n2, int64_t n3) {
    deltanet_tensor t = {.dtype = dtype, .ne = {n0, n1, n2, n3}};
    t.nb[0] = dtype == DELTANET_DTYPE_F32 || dtype == DELTANET_DTYPE_I32 ? 4 : dtype == DELTANET_DTYPE_I64 ? 8 : 2;
    for (int axis = 1; axis < 4; axis++) t.nb[axis] = t.nb[axis - 1] * (size_t) t.ne[axis - 1];
    t.data = fake->allocate(t.nb[3] * (size_t) n3, place);
    return t;
}

static deltanet_params describe(int kind, int64_t s, int64_t tokens, int64_t sequences, int place) {
    enum { KEYS = 2, VALUES = 4, SLOTS = 4, ROWS = 8 };
    const uint32_t f32 = DELTANET_DTYPE_F32, io = kind & HALF ? DELTANET_DTYPE_BF16 : f32;
    const int64_t batch = kind & RAGGED ? 1 : sequences, rows = kind & POOL ? ROWS : sequences;
    deltanet_params p = {.struct_size = sizeof p}, *d = &p;
    d->q = tensor(io, place, s, KEYS, tokens, batch);
    d->k = tensor(io, place, s, KEYS, tokens, batch);
    d->v = tensor(io, place, s, VALUES, tokens, batch);
    d->g = tensor(f32, place, kind & CHANNEL_GATE ? s : 1, VALUES, tokens, batch);
    d->beta = tensor(f32, place, 1, VALUES, tokens, batch);
    d->state_in = tensor(f32, place, s, s, VALUES, rows);
    d->out = tensor(io, place, s, VALUES, tokens, batch);
    d->state_out = tensor(f32, place, s, s, VALUES, rows);
    if (kind & VALUES_FIRST) d->state_layout = DELTANET_STATE_LAYOUT_VALUE_CONTIGUOUS;
    if (kind & RAGGED) d->cu_seqlens = tensor(DELTANET_DTYPE_I64, place, sequences + 1, 1, 1, 1);
    if (kind & POOL) {
        d->rows_in = tensor(DELTANET_DTYPE_I32, place, sequences, 1, 1, 1);
        d->rows_out = tensor(DELTANET_DTYPE_I64, place, sequences, 1, 1, 1);
    }
    if (kind & SNAPSHOTS) {
        d->snapshots = tensor(f32, place, s, s, VALUES, sequences * SLOTS);
        d->snapshots.ne[3] = sequences;
        d->snapshot_stride = d->snapshots.nb[3] * (size_t) sequences;
        d->snapshot_slots = d->n_snapshots = SLOTS;
    }
    return p;
}

static problem make(int kind, int64_t s, int64_t tokens, int64_t sequences, int place) {
    problem p = {.params = describe(kind, s, tokens, sequences, place)};
    TAKEN(deltanet_cuda_workspace_size(&p.params, &p.size));
    p.workspace = p.size ? fake->allocate(p.size, place) : NULL;
    p.stream = (void *) &fake; /* any: the fake never looks behind it */
    return p;
}

static deltanet_status run(const problem *p) { return deltanet_cuda_run(&p->params, p->workspace, p->size, p->stream); }

enum { ROOM = 4096 };
static fake_launch taken[ROOM];

static size_t launches(void) {
    size_t n = fake->launches(taken, ROOM);
    REQUIRE(n < ROOM, "too many launches to look at");
    return n;
}

static void require_no_launch(void) {
    size_t n = launches();
    REQUIRE(n == 0, "%zu launches, the first of %s", n, taken[0].kernel);
}

/* Everything that runs in different ways. */
enum { PROBLEMS = 9 };
static void make_all(problem *to, int place) {
    size_t n = 0;
    to[n++] = make(PLAIN, 128, 1, 2, place);
    to[n++] = make(VALUES_FIRST, 64, 3, 1, place);
    to[n++] = make(HALF | CHANNEL_GATE | SNAPSHOTS, 48, 7, 2, place);
    to[n++] = make(POOL, 32, 9, 3, place);
    to[n++] = make(RAGGED | POOL, 128, 30, 3, place);
    to[n++] = make(PLAIN, 128, 3000, 5, place);
    to[n++] = make(SNAPSHOTS | HALF, 64, 500, 1, place);
    to[n++] = make(RAGGED, 128, 2000, 4, place);
    to[n++] = make(PLAIN, 64, 4096, 1, place);
    REQUIRE(n == PROBLEMS, "%zu problems", n);
}

/* ---- tests -------------------------------------------------------------------------------------------------------- */

/* The name of an error, or its number where the driver does not even tell that. */
static bool names(const char *words, const char *name, int code) {
    char number[32];
    snprintf(number, sizeof number, "error %d", code);
    return strstr(words, name) || strstr(words, number);
}

static const struct {
    int code;
    const char *name;
    deltanet_status status;
} ERRORS[] = {
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", DELTANET_STATUS_OUT_OF_MEMORY},
    {CUDA_ERROR_DEVICE_UNAVAILABLE, "CUDA_ERROR_DEVICE_UNAVAILABLE", DELTANET_STATUS_CUDA},
    {CUDA_ERROR_ECC_UNCORRECTABLE, "CUDA_ERROR_ECC_UNCORRECTABLE", DELTANET_STATUS_CUDA},
    {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", DELTANET_STATUS_CUDA},
    {CUDA_ERROR_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", DELTANET_STATUS_CUDA},
    {CUDA_ERROR_CONTEXT_IS_DESTROYED, "CUDA_ERROR_CONTEXT_IS_DESTROYED", DELTANET_STATUS_CUDA},
    {CUDA_ERROR_UNKNOWN, "CUDA_ERROR_UNKNOWN", DELTANET_STATUS_CUDA},
    {4711, "error 4711", DELTANET_STATUS_CUDA}, /* of a driver to come */
};
enum { N_ERRORS = sizeof ERRORS / sizeof *ERRORS };

/* Fails each driver call of the first `prepare` in a context in turn: alone, then with all that follow. */
static void test_prepare(void) {
    find_driver();
    CUcontext context = fake->create(0);
    problem p = make(PLAIN, 128, 1, 2, 0);
    TAKEN(deltanet_cuda_prepare());
    fake->destroy(context);
    long failing = 0, most = 0;
    for (int e = 0; e < N_ERRORS; e++) {
        for (int rest = 0; rest < 2; rest++) {
            context = fake->create(0);
            for (long at = 0;; at++) {
                long before = fake->modules();
                fake->fail(NULL, at, rest ? -1 : 1, ERRORS[e].code);
                deltanet_status status = deltanet_cuda_prepare();
                long failed = fake->failed();
                const char *function = fake->failed_function();
                fake->fail(NULL, 0, 0, 0);
                if (failed == 0) {
                    REQUIRE(status == OK, "no call failed");
                    most = at > most ? at : most;
                    break;
                }
                failing++;
                const char *words = deltanet_last_error();
                REQUIRE(status == ERRORS[e].status, "call %ld, %s: %s", at, function, deltanet_status_name(status));
                REQUIRE(strstr(words, function) && names(words, ERRORS[e].name, ERRORS[e].code), "call %ld, %s", at, function);
                /* Modules are given back, unless the driver refuses that too. */
                REQUIRE(rest || fake->modules() == before, "%ld modules are left", fake->modules() - before);
                REFUSED(run(&p), CUDA, "deltanet_cuda_prepare must be called");
                require_no_launch();
                if (rest) fake->destroy(context), context = fake->create(0);
            }
            TAKEN(run(&p));
            REQUIRE(launches() == 1, "a token is one launch");
            fake->destroy(context);
        }
    }
    REQUIRE(most > 100, "only %ld calls", most);
    /* What an image that is not for the driver is called. */
    static const int mismatches[] = {CUDA_ERROR_NO_BINARY_FOR_GPU, CUDA_ERROR_INVALID_PTX, CUDA_ERROR_JIT_COMPILER_NOT_FOUND,
                                     CUDA_ERROR_UNSUPPORTED_PTX_VERSION};
    context = fake->create(0);
    *fake->version = 12020;
    for (int i = 0; i < 4; i++) {
        for (int image = 0; image < 2; image++) {
            fake->fail("cuModuleLoadData", image, 1, mismatches[i]);
            REFUSED(deltanet_cuda_prepare(), UNSUPPORTED, "(for CUDA 12.2) cannot load the kernels");
            REQUIRE(fake->modules() == 0, "a module is left");
        }
    }
    TAKEN(deltanet_cuda_prepare());
    printf("%ld failing calls of up to %ld in a prepare: the status and both names each time, no module left, works afterwards\n",
           failing, most);
}

/* Fails each driver call of a run in turn. */
static void test_run(void) {
    find_driver();
    fake->create(0);
    TAKEN(deltanet_cuda_prepare());
    problem all[PROBLEMS];
    make_all(all, 0);
    long failing = 0, most = 0, undone = 0;
    for (int i = 0; i < PROBLEMS; i++) {
        const problem *p = &all[i];
        static fake_launch whole[ROOM];
        TAKEN(run(p));
        size_t n = launches();
        memcpy(whole, taken, sizeof whole);
        REQUIRE(n > 0, "nothing was launched");
        for (size_t at = 0; at < n; at++)
            REQUIRE(taken[at].stream == p->stream && strncmp(taken[at].kernel, "dn_", 3) == 0, "launch %zu", at);
        for (int e = 0; e < N_ERRORS; e++) {
            for (int rest = 0; rest < 2; rest++) {
                for (long at = 0;; at++) {
                    fake->fail(NULL, at, rest ? -1 : 1, ERRORS[e].code);
                    deltanet_status status = run(p);
                    long failed = fake->failed();
                    const char *function = fake->failed_function();
                    fake->fail(NULL, 0, 0, 0);
                    size_t queued = launches();
                    if (failed == 0) {
                        REQUIRE(status == OK && queued == n && memcmp(taken, whole, n * sizeof *whole) == 0, "problem %d", i);
                        most = at > most ? at : most;
                        break;
                    }
                    failing++;
                    const char *words = deltanet_last_error();
                    REQUIRE(status == ERRORS[e].status, "call %ld, %s: %s", at, function, deltanet_status_name(status));
                    REQUIRE(strstr(words, function) && names(words, ERRORS[e].name, ERRORS[e].code), "call %ld, %s", at, function);
                    /* A message that promises nothing queued must be right, and one that does not must tell. */
                    char told[64];
                    snprintf(told, sizeof told, "after %zu launches of this call", queued);
                    REQUIRE(queued ? strstr(words, told) != NULL : !strstr(words, "launches of this call"), "%zu queued", queued);
                    undone += queued > 0;
                }
            }
        }
    }
    REQUIRE(undone > 0, "no problem has several launches");
    printf("%ld failing calls of up to %ld in a run: the status and both names each time; %ld after other launches of the call, "
           "whose number is told\n",
           failing, most, undone);
}

static void *run_elsewhere(void *argument) {
    fake->set_current(*(CUcontext *) argument);
    static problem p;
    p = make(PLAIN, 64, 1, 1, 0);
    return (void *) (uintptr_t) run(&p);
}

/* A context that a kernel has broken: every call says so, from any thread, and other contexts work on. */
static void test_sticky(void) {
    find_driver();
    static const int broken[] = {CUDA_ERROR_ILLEGAL_ADDRESS, CUDA_ERROR_LAUNCH_FAILED, CUDA_ERROR_ECC_UNCORRECTABLE,
                                 CUDA_ERROR_DEVICE_UNAVAILABLE};
    static const char *const words[] = {"CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_LAUNCH_FAILED", "CUDA_ERROR_ECC_UNCORRECTABLE",
                                        "CUDA_ERROR_DEVICE_UNAVAILABLE"};
    CUcontext other = fake->create(1);
    TAKEN(deltanet_cuda_prepare());
    problem all[PROBLEMS], there = make(PLAIN, 128, 1, 1, 1);
    make_all(all, 0);
    long refusals = 0;
    for (int i = 0; i < 4; i++) {
        for (int before = 0; before < 2; before++) {
            CUcontext context = fake->create(0);
            if (before) fake->break_context(context, broken[i]); /* and then there is nothing to prepare */
            if (before) REFUSED(deltanet_cuda_prepare(), CUDA, words[i]);
            else TAKEN(deltanet_cuda_prepare());
            for (int n = 0; !before && n < PROBLEMS; n++) TAKEN(run(&all[n]));
            launches();
            fake->break_context(context, broken[i]);
            for (int again = 0; again < 3; again++) {
                for (int n = 0; n < PROBLEMS; n++, refusals++)
                    REFUSED(run(&all[n]), CUDA, before ? "deltanet_cuda_prepare must be called" : words[i]);
                pthread_t thread;
                void *status;
                REQUIRE(pthread_create(&thread, NULL, run_elsewhere, &context) == 0, "no thread");
                pthread_join(thread, &status);
                REQUIRE((uintptr_t) status == CUDA, "another thread");
                require_no_launch();
                fake->set_current(other);
                TAKEN(run(&there));
                REQUIRE(launches() == 1, "the other context works");
                fake->set_current(context);
            }
            fake->destroy(context);
            REFUSED(run(&all[0]), CUDA, "CUDA_ERROR_CONTEXT_IS_DESTROYED");
            REFUSED(deltanet_cuda_prepare(), CUDA, "CUDA_ERROR_CONTEXT_IS_DESTROYED");
            /* A new one at the same address is another one. */
            REQUIRE(fake->create(0) == context, "the fake takes the lowest address");
            REFUSED(run(&all[0]), CUDA, "deltanet_cuda_prepare must be called");
            TAKEN(deltanet_cuda_prepare());
            for (int n = 0; n < PROBLEMS; n++) TAKEN(run(&all[n]));
            launches();
            fake->destroy(context);
        }
    }
    printf("4 sticky errors, before and after prepare: %ld refusals that name them, nothing launched, another context works on, "
           "a new one at the same address starts anew\n",
           refusals);
}

/* A driver that does not start, and then does. */
static void test_start(void) {
    find_driver();
    fake->create(0);
    problem p = make(PLAIN, 64, 1, 1, 0);
    static const struct {
        int code;
        const char *name;
    } reasons[] = {{CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE"},
                   {CUDA_ERROR_DEVICE_UNAVAILABLE, "CUDA_ERROR_DEVICE_UNAVAILABLE"},
                   {CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"},
                   {CUDA_ERROR_UNKNOWN, "CUDA_ERROR_UNKNOWN"}};
    for (int i = 0; i < 4; i++) {
        fake->fail("cuInit", 0, -1, reasons[i].code);
        for (int again = 0; again < 3; again++) {
            REFUSED(deltanet_cuda_prepare(), UNSUPPORTED, reasons[i].name);
            REFUSED(run(&p), UNSUPPORTED, "cuInit");
        }
        REQUIRE(fake->failed() == 6, "every call asks again");
    }
    fake->fail("cuInit", 0, -1, CUDA_ERROR_OUT_OF_MEMORY);
    REFUSED(deltanet_cuda_prepare(), OUT_OF_MEMORY, "cuInit: the CUDA driver returned CUDA_ERROR_OUT_OF_MEMORY");
    fake->fail(NULL, 0, 0, 0);
    require_no_launch();
    TAKEN(deltanet_cuda_prepare());
    TAKEN(run(&p));
    REQUIRE(launches() == 1 && fake->calls("cuInit") == 26, "%ld calls of cuInit", fake->calls("cuInit"));
    printf("a driver that does not start: UNSUPPORTED and why, every time; works once it does\n");
}

/* With a libcuda that lacks `symbol`, or with none (an empty name). */
static void test_missing(const char *symbol) {
    const char *words = *symbol ? symbol : "libcuda was not found";
    if (!*symbol && dlopen("libcuda.so.1", RTLD_NOW)) {
        printf("SKIPPED: this machine has a driver\n");
        return;
    }
    deltanet_params nothing = {.struct_size = sizeof nothing};
    size_t size = 1;
    for (int again = 0; again < 3; again++) REFUSED(deltanet_cuda_prepare(), UNSUPPORTED, words);
    /* What needs no driver works all the same. */
    float memory[8];
    deltanet_tensor t = {.data = memory, .ne = {16, 1, 0, 1}, .nb = {4, 64, 64, 64}}, state = t;
    nothing.q = nothing.k = nothing.v = nothing.out = t;
    t.ne[0] = 1, nothing.g = nothing.beta = t;
    state.ne[0] = state.ne[1] = 16, state.ne[2] = 1, state.nb[2] = state.nb[3] = 1024, nothing.state_in = state;
    TAKEN(deltanet_cuda_workspace_size(&nothing, &size));
    char text[64];
    TAKEN(deltanet_cuda_describe(&nothing, text, sizeof text));
    REFUSED(deltanet_cuda_run(&nothing, NULL, 0, NULL), UNSUPPORTED, words);
    printf("without %s: %s\n", *symbol ? symbol : "libcuda", deltanet_last_error());
}

/* What devices get. */
static void test_devices(void) {
    find_driver();
    static const struct {
        fake_device device;
        int version;
        const char *prompt; /* how the first kernel of a prompt is named; null: refused */
        bool overlap;
    } kinds[] = {
        {{6, 1, 49152, 20}, 12040, NULL, false},
        {{7, 0, 98304, 80}, 12040, NULL, false},
        {{7, 5, 65536, 40}, 12040, "dn_recurrent_window_s128", false},
        {{8, 0, 166912, 108}, 12040, "dn_chunk_prepare_exact_s128_c32", false},
        {{8, 6, 101376, 82}, 13000, "dn_chunk_prepare_exact_s128_c32", false},
        {{8, 6, 65536, 82}, 13000, "dn_recurrent_window_s128", false}, /* less than any has */
        {{9, 0, 232448, 132}, 13000, "dn_chunk_prepare_exact_s128_c64", true},
        {{9, 0, 232448, 132}, 12020, "dn_chunk_prepare_exact_s128_c64", false}, /* captures no overlap */
        {{10, 0, 232448, 148}, 13000, "dn_chunk_prepare_exact_s128_c64", true},
        {{12, 0, 101376, 170}, 13000, "dn_chunk_prepare_exact_s128_c32", true},
    };
    problem p = make(PLAIN, 128, 3000, 1, 0);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        fake->devices[0] = kinds[i].device;
        *fake->version = kinds[i].version;
        CUcontext context = fake->create(0);
        if (!kinds[i].prompt) {
            char words[64];
            snprintf(words, sizeof words, "compute capability %d.%d; it must be at least 7.5", kinds[i].device.major,
                     kinds[i].device.minor);
            for (int again = 0; again < 2; again++) REFUSED(deltanet_cuda_prepare(), UNSUPPORTED, words);
            REFUSED(run(&p), CUDA, "deltanet_cuda_prepare must be called");
            REQUIRE(fake->calls("cuModuleLoadData") == 0, "kernels were loaded all the same");
            require_no_launch();
        } else {
            TAKEN(deltanet_cuda_prepare());
            TAKEN(run(&p));
            size_t n = launches();
            bool overlap = false;
            for (size_t at = 0; at < n; at++) overlap = overlap || taken[at].overlap;
            REQUIRE(n > 0 && strncmp(taken[0].kernel, kinds[i].prompt, strlen(kinds[i].prompt)) == 0, "device %zu: %s", i, taken[0].kernel);
            REQUIRE(overlap == kinds[i].overlap, "device %zu: overlap", i);
        }
        fake->destroy(context);
    }
    printf("%zu kinds of devices: refused below 7.5, and the right kernels from there on\n", sizeof kinds / sizeof *kinds);
}

static deltanet_tensor *tensor_at(deltanet_params *p, int i, const char **name) {
    static const char *const names_of[] = {"q", "k", "v", "g", "beta", "state_in", "out", "state_out", "snapshots",
                                           "rows_in", "rows_out", "cu_seqlens"};
    deltanet_tensor *all[] = {&p->q, &p->k, &p->v, &p->g, &p->beta, &p->state_in, &p->out, &p->state_out, &p->snapshots,
                              &p->rows_in, &p->rows_out, &p->cu_seqlens};
    if (i == sizeof all / sizeof *all) return NULL;
    *name = names_of[i];
    return all[i];
}

/* Memory that is not the device's, and no context. */
static void test_memory(void) {
    find_driver();
    fake->set_current(NULL);
    problem all[PROBLEMS];
    make_all(all, 0);
    REFUSED(deltanet_cuda_prepare(), CUDA, "no current CUDA context");
    REFUSED(run(&all[0]), CUDA, "no current CUDA context");
    fake->create(0);
    TAKEN(deltanet_cuda_prepare());
    long refusals = 0;
    for (int i = 0; i < PROBLEMS; i++) {
        const char *name;
        char words[64];
        for (int n = 0; tensor_at(&all[i].params, n, &name); n++) {
            problem p = all[i];
            deltanet_tensor *t = tensor_at(&p.params, n, &name);
            if (!t->data) continue;
            const size_t most = 64 << 20;
            void *const places[] = {&p, fake->allocate(most, FAKE_HOST), fake->allocate(most, 1)};
            for (int place = 0; place < 3; place++, refusals++) {
                t->data = (void *) ((uintptr_t) places[place] & ~(uintptr_t) 63);
                snprintf(words, sizeof words, place == 2 ? "%s is on CUDA device 1; it must be on device 0" : "%s is at 0x", name);
                REFUSED(run(&p), CUDA, words);
                require_no_launch();
            }
            t->data = fake->allocate(most, FAKE_MANAGED);
            TAKEN(run(&p));
            launches();
        }
        problem p = all[i];
        if (!p.size) {
            p.workspace = &p; /* nobody looks at it */
            TAKEN(run(&p));
            launches();
            continue;
        }
        p.workspace = NULL;
        REFUSED(run(&p), DELTANET_STATUS_NULL_POINTER, "workspace is null; it must point to at least");
        p.workspace = all[i].workspace, p.size -= 1;
        REFUSED(run(&p), DELTANET_STATUS_SCRATCH, "workspace_size is");
        p.size = 0;
        REFUSED(run(&p), DELTANET_STATUS_SCRATCH, "workspace_size is 0; it must be at least");
        p.size = all[i].size, p.workspace = &p;
        REFUSED(run(&p), CUDA, "workspace is at 0x");
        p.workspace = fake->allocate(p.size, 1);
        REFUSED(run(&p), CUDA, "workspace is on CUDA device 1");
        refusals += 5;
        require_no_launch();
    }
    /* Without sequences there is no state to look for. */
    problem nobody = make(PLAIN, 128, 1, 1, 0);
    const char *name;
    for (int n = 0; tensor_at(&nobody.params, n, &name); n++) tensor_at(&nobody.params, n, &name)->ne[3] = 0;
    nobody.params.state_in.data = nobody.params.state_out.data = &nobody;
    TAKEN(run(&nobody));
    require_no_launch();
    /* The validator comes before the driver. */
    long calls = fake->calls(NULL);
    problem p = all[0];
    p.params.k.ne[1] += 1;
    REFUSED(run(&p), DELTANET_STATUS_SHAPE, "k.ne[1]");
    REFUSED(deltanet_cuda_run(NULL, NULL, 0, NULL), DELTANET_STATUS_NULL_POINTER, "params");
    p.params = describe(PLAIN, 512, 1, 1, 0);
    REFUSED(run(&p), UNSUPPORTED, "the head size) is 512; on CUDA it must be at most 256");
    REFUSED(deltanet_cuda_workspace_size(&p.params, &p.size), UNSUPPORTED, "head size");
    REFUSED(deltanet_cuda_workspace_size(&p.params, NULL), DELTANET_STATUS_NULL_POINTER, "size is null");
    REQUIRE(fake->calls(NULL) == calls, "the driver was asked");
    printf("%ld wrong pointers and workspaces refused by name, nothing launched; managed memory is taken\n", refusals);
}

/* Captures: what has to be done before one, and what may be done in it. */
static void test_capture(void) {
    find_driver();
    fake->create(0);
    problem all[PROBLEMS];
    make_all(all, 0);
    fake->capture(true);
    REFUSED(run(&all[0]), CUDA, "deltanet_cuda_prepare must be called in it first, outside of any stream capture");
    for (int again = 0; again < 2; again++) REFUSED(deltanet_cuda_prepare(), CUDA, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED");
    fake->capture(false);
    TAKEN(deltanet_cuda_prepare());
    fake->capture(true);
    /* The allowed ones: questions that a capture permits, and launches. */
    static const char *const allowed[] = {"cuCtxGetCurrent", "cuCtxGetId", "cuPointerGetAttributes", "cuLaunchKernel",
                                          "cuLaunchKernelEx"};
    long all_before = fake->calls(NULL), allowed_before = 0, allowed_after = 0;
    for (int i = 0; i < 5; i++) allowed_before += fake->calls(allowed[i]);
    begin_faults(-1, false);
    for (int i = 0; i < PROBLEMS; i++) TAKEN(run(&all[i]));
    TAKEN(deltanet_cuda_prepare());
    end_faults();
    REQUIRE(allocations == 0, "%ld allocations in runs", allocations);
    for (int i = 0; i < 5; i++) allowed_after += fake->calls(allowed[i]);
    REQUIRE(fake->calls(NULL) - all_before == allowed_after - allowed_before, "a run asks for more than that");
    printf("captures: refused without prepare; afterwards %zu launches by %d runs that ask and launch only, and allocate nothing\n",
           launches(), PROBLEMS);
}

/* Many threads with contexts of their own on both devices, and some that share one. */
static void *own_context(void *argument) {
    const uintptr_t number = (uintptr_t) argument;
    const int device = (int) number % 2;
    static CUcontext shared[2];
    problem all[PROBLEMS];
    make_all(all, device);
    for (int round = 0; round < 20; round++) {
        CUcontext own = number < 8 ? fake->create(device) : NULL;
        if (!own) {
            static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
            pthread_mutex_lock(&lock);
            if (!shared[device]) shared[device] = fake->create(device);
            pthread_mutex_unlock(&lock);
            fake->set_current(shared[device]);
        }
        TAKEN(deltanet_cuda_prepare());
        for (int i = 0; i < PROBLEMS; i++) TAKEN(run(&all[i]));
        /* A mistake of this thread is in this thread's message. */
        problem wrong = all[0];
        wrong.params.q.data = fake->allocate(4096, 1 - device);
        char words[64];
        snprintf(words, sizeof words, "q is on CUDA device %d; it must be on device %d", 1 - device, device);
        REFUSED(run(&wrong), CUDA, words);
        if (own) fake->destroy(own);
    }
    return NULL;
}

static void test_contexts(void) {
    enum { THREADS = 12 };
    find_driver();
    pthread_t threads[THREADS];
    for (uintptr_t i = 0; i < THREADS; i++) REQUIRE(pthread_create(&threads[i], NULL, own_context, (void *) i) == 0, "no thread");
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    /* 2 modules in each of the shared contexts; the others' went with them. */
    REQUIRE(fake->modules() == 4, "%ld modules", fake->modules());
    printf("%d threads, 160 contexts of their own and 2 that four threads share: every launch in its own context\n", THREADS);
}

static void *prepare_in(void *argument) {
    fake->set_current(argument);
    return (void *) (uintptr_t) deltanet_cuda_prepare();
}

/* A load that takes for ever in one context; others run on. */
static void test_hold(void) {
    find_driver();
    CUcontext ready = fake->create(0), fresh = fake->create(1);
    fake->set_current(ready);
    TAKEN(deltanet_cuda_prepare());
    problem p = make(PLAIN, 128, 3000, 1, 0);
    fake->hold("cuModuleLoadData");
    pthread_t thread;
    REQUIRE(pthread_create(&thread, NULL, prepare_in, fresh) == 0, "no thread");
    while (fake->held() == 0) usleep(1000);
    for (int i = 0; i < 100; i++) TAKEN(run(&p));
    TAKEN(deltanet_cuda_prepare());
    fake->set_current(fresh);
    REFUSED(run(&p), CUDA, "deltanet_cuda_prepare must be called");
    fake->hold(NULL);
    void *status;
    pthread_join(thread, &status);
    REQUIRE((uintptr_t) status == OK, "the load that was held");
    printf("while a load in one context waits, 100 runs in another are queued\n");
}

/* Whether a child that prepares and runs ends in time, and that it is refused. */
static void child_is_refused(const problem *p) {
    pid_t child = fork();
    if (child == 0) {
        alarm(20);
        for (int again = 0; again < 2; again++) {
            REFUSED(deltanet_cuda_prepare(), CUDA, "forked");
            if (p) REFUSED(run(p), CUDA, "forked");
        }
        _exit(0);
    }
    int status;
    REQUIRE(child > 0 && waitpid(child, &status, 0) == child, "fork");
    REQUIRE(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a child ended with %x", (unsigned) status);
}

static void *prepare_first(void *unused) {
    (void) unused;
    /* Loads the driver (slowly); there is no context yet. */
    REFUSED(deltanet_cuda_prepare(), CUDA, "no current CUDA context");
    return NULL;
}

/* Forks while other threads are in the library: children never wait for threads that they do not have. */
static void test_fork(void) {
    pthread_t thread;
    void *status;
    REQUIRE(pthread_create(&thread, NULL, prepare_first, NULL) == 0, "no thread");
    usleep(300 * 1000); /* the thread is loading, by FAKE_CUDA_LOADS_IN of 1500 ms each time */
    child_is_refused(NULL);
    pthread_join(thread, NULL);
    find_driver();
    CUcontext ready = fake->create(0), fresh = fake->create(1);
    problem p = make(PLAIN, 128, 3000, 1, 0);
    fake->set_current(ready);
    TAKEN(deltanet_cuda_prepare());
    child_is_refused(&p);
    fake->hold("cuModuleLoadData");
    REQUIRE(pthread_create(&thread, NULL, prepare_in, fresh) == 0, "no thread");
    while (fake->held() == 0) usleep(1000);
    child_is_refused(&p);
    fake->hold(NULL);
    pthread_join(thread, &status);
    TAKEN(run(&p));
    printf("children forked while threads load the driver and load kernels: refused in time; the parent works on\n");
}

/* The child of a process whose driver never started is free to use its own. */
static void test_fork_start(void) {
    find_driver();
    CUcontext context = fake->create(0);
    problem p = make(PLAIN, 128, 1, 1, 0);
    fake->fail("cuInit", 0, -1, CUDA_ERROR_NO_DEVICE);
    REFUSED(deltanet_cuda_prepare(), UNSUPPORTED, "CUDA_ERROR_NO_DEVICE");
    fake->fail(NULL, 0, 0, 0);
    fake->hold("cuInit");
    pthread_t thread;
    REQUIRE(pthread_create(&thread, NULL, prepare_in, context) == 0, "no thread");
    while (fake->held() == 0) usleep(1000);
    child_is_refused(&p); /* a thread of the parent is starting it */
    fake->fail("cuInit", 0, -1, CUDA_ERROR_NO_DEVICE);
    fake->hold(NULL);
    void *answer;
    pthread_join(thread, &answer);
    pid_t child = fork();
    if (child == 0) {
        alarm(20);
        fake->fail(NULL, 0, 0, 0);
        TAKEN(deltanet_cuda_prepare());
        TAKEN(run(&p));
        _exit(launches() == 1 ? 0 : 1);
    }
    int status;
    REQUIRE(child > 0 && waitpid(child, &status, 0) == child && status == 0, "a child ended with %x", (unsigned) status);
    printf("children of a process whose driver does not start may start their own\n");
}

/* Memory of the host fails: each allocation in turn. */
static void test_allocations(void) {
    problem p;
    /* Before anything else: finding the driver, by code that allocates in small pieces and cannot fail, but only once there
     * is more than it needs. */
    smallest = 8192;
    begin_faults(0, false);
    deltanet_status status = deltanet_cuda_prepare();
    REQUIRE(end_faults() == 1 && status == OUT_OF_MEMORY, "status %u", status);
    smallest = 0;
    find_driver();
    REQUIRE(fake->calls(NULL) == 0, "the driver was called");
    REFUSED(deltanet_cuda_prepare(), CUDA, "no current CUDA context");
    long refusals = 0;
    for (int rest = 0; rest < 2; rest++) {
        CUcontext context = fake->create(0);
        for (long at = 0;; at++, refusals++) {
            begin_faults(at, rest);
            status = deltanet_cuda_prepare();
            if (end_faults() == 0) break;
            REQUIRE(status == OUT_OF_MEMORY, "allocation %ld: %s", at, deltanet_status_name(status));
            REQUIRE(fake->modules() == rest * 2, "modules are left");
        }
        REQUIRE(status == OK, "works once there is memory");
        (void) context;
    }
    p = make(PLAIN, 128, 1, 1, 0);
    problem wrong = p;
    wrong.params.q.data = &wrong;
    for (int rest = 0; rest < 2; rest++) {
        for (long at = 0;; at++, refusals++) {
            begin_faults(at, rest);
            status = run(&wrong);
            long failed = end_faults();
            REQUIRE(status == CUDA, "a refusal keeps its status: %s", deltanet_status_name(status));
            if (failed == 0) break;
        }
        fake->fail("cuLaunchKernelEx", 0, -1, CUDA_ERROR_LAUNCH_FAILED);
        for (long at = 0;; at++, refusals++) {
            begin_faults(at, rest);
            status = run(&p);
            long failed = end_faults();
            REQUIRE(status == CUDA, "a refusal keeps its status: %s", deltanet_status_name(status));
            if (failed == 0) break;
        }
        fake->fail(NULL, 0, 0, 0);
    }
    require_no_launch();
    TAKEN(run(&p));
    printf("%ld failing allocations: OUT_OF_MEMORY or the refusal's own status, nothing launched, no module left\n", refusals);
}

int main(int count, char **words) {
    static const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {{"prepare", test_prepare},   {"run", test_run},           {"sticky", test_sticky}, {"start", test_start},
                 {"devices", test_devices},   {"memory", test_memory},     {"capture", test_capture},
                 {"contexts", test_contexts}, {"hold", test_hold},         {"fork", test_fork},
                 {"fork-start", test_fork_start}, {"allocations", test_allocations}};
    alarm(300); /* nothing here waits for long: a hang is a failure */
    const char *test = count > 1 ? words[1] : "";
    bool found = strcmp(test, "missing") == 0;
    if (found) test_missing(count > 2 ? words[2] : "");
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        if (strcmp(test, tests[i].name) != 0) continue;
        found = true;
        tests[i].run();
    }
    REQUIRE(found, "there is no test \"%s\"", test);
    if (fake) {
        const char *mistake;
        REQUIRE(!fake->first_mistake(&mistake), "no driver would take this: %s", mistake);
    }
    return 0;
}
