/* Runs golden cases of the gated delta net through libdeltanet: nothing but deltanet.h, the library and libc.
 *
 *     driver [-t THREADS] [-r REPEATS] [-e TOLERANCE] FILE.safetensors...
 *
 * Each case runs in the library's own threads (deltanet_run) and in threads of this program (deltanet_run_part). One
 * line of `key=value` words a run goes to the standard output; the exit status is 1 if anything is not as it must be.
 * SPDX-License-Identifier: MIT */
#define _POSIX_C_SOURCE 200809L
#include "deltanet.h"
#include "safetensors.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_THREADS = 64, MAX_REPEATS = 10000 };

static double microseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1e6 * (double) now.tv_sec + 1e-3 * (double) now.tv_nsec;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *) a, y = *(const double *) b;
    return (x > y) - (x < y);
}

/* Squared error over squared expectation; a NaN anywhere makes it NaN. */
static double nmse(const float *got, const float *expected, size_t n) {
    double error = 0.0, norm = 0.0;
    for (size_t i = 0; i < n; i++) {
        double difference = (double) got[i] - (double) expected[i];
        error += difference * difference;
        norm += (double) expected[i] * (double) expected[i];
    }
    return norm > 0.0 ? error / norm : error;
}

/* ---- A case: the file's tensors as the operator's, and memory for the results. ---- */

typedef struct {
    st_file file;
    deltanet_params params;
    const st_tensor *out, *state_out;
    char name[128];
} golden;

/* Describes a dense f32 tensor of the file: its axes are (sequence, token, head, channel) outermost first, the
 * operator's (channel, head, token, sequence) innermost first. Gate and beta may lack the channel axis. */
static int describe(deltanet_tensor *to, st_file *file, const char *name, size_t least_axes) {
    const st_tensor *from = st_find(file, name);
    if (!from || strcmp(from->dtype, "F32") || from->n_axes < least_axes || from->n_axes > 4) {
        fprintf(stderr, "tensor %s is missing, or not f32 with %zu to 4 axes\n", name, least_axes);
        return -1;
    }
    to->data = from->data;
    to->dtype = DELTANET_DTYPE_F32;
    size_t stride = sizeof(float);
    for (size_t axis = 0; axis < 4; axis++) {
        size_t skipped = 4 - from->n_axes;
        to->ne[axis] = axis < skipped ? 1 : from->shape[from->n_axes - 1 - (axis - skipped)];
        to->nb[axis] = stride;
        stride *= (size_t) to->ne[axis];
    }
    return 0;
}

/* 1 if the metadata has one of the `known` words under `key`, with its index in `at`. */
static int word(const st_file *file, const char *key, const char *const *known, size_t n, size_t *at) {
    const char *value = st_metadata(file, key);
    for (*at = 0; value && *at < n; ++*at)
        if (!strcmp(value, known[*at])) return 1;
    fprintf(stderr, "metadata %s is %s, which this program does not know\n", key, value ? value : "missing");
    return 0;
}

static int load(golden *g, const char *path) {
    memset(g, 0, sizeof *g);
    char error[512];
    if (st_open(&g->file, path, error, sizeof error)) {
        fprintf(stderr, "%s\n", error);
        return -1;
    }
    const char *slash = strrchr(path, '/');
    snprintf(g->name, sizeof g->name, "%s", slash ? slash + 1 : path);
    char *dot = strrchr(g->name, '.');
    if (dot) *dot = '\0';

    deltanet_params *p = &g->params;
    p->struct_size = sizeof *p;
    if (describe(&p->q, &g->file, "q", 4) || describe(&p->k, &g->file, "k", 4) || describe(&p->v, &g->file, "v", 4) ||
        describe(&p->g, &g->file, "g", 3) || describe(&p->beta, &g->file, "beta", 3) ||
        describe(&p->state_in, &g->file, "state_in", 4) || describe(&p->out, &g->file, "out", 4) ||
        describe(&p->state_out, &g->file, "state_out", 4))
        return -1;

    static const char *const maps[] = {"tiled", "grouped", "one-to-one"};
    static const char *const layouts[] = {"[B,Hv,Sv,Sk]", "[B,Hv,Sk,Sv]", "[B,H,Sk,Sv]"};
    size_t map, layout;
    if (!word(&g->file, "head_map", maps, 3, &map) || !word(&g->file, "state", layouts, 3, &layout)) return -1;
    p->head_map = map == 1 ? DELTANET_HEAD_MAP_GROUPED : DELTANET_HEAD_MAP_TILED;
    p->state_layout = layout == 0 ? DELTANET_STATE_LAYOUT_KEY_CONTIGUOUS : DELTANET_STATE_LAYOUT_VALUE_CONTIGUOUS;
    const char *norm = st_metadata(&g->file, "l2norm");
    if (norm && strcmp(norm, "none")) {
        char *end;
        p->qk_norm = 1;
        p->qk_norm_eps = strtof(norm, &end);
        if (end == norm || *end) {
            fprintf(stderr, "metadata l2norm is %s; it must be none or a number\n", norm);
            return -1;
        }
    }

    /* The file's own out and state_out are what to expect; results get memory of their own. */
    g->out = st_find(&g->file, "out");
    g->state_out = st_find(&g->file, "state_out");
    p->out.data = malloc(g->out->bytes + 1);
    p->state_out.data = malloc(g->state_out->bytes + 1);
    return p->out.data && p->state_out.data ? 0 : -1;
}

static void unload(golden *g) {
    if (g->out) free(g->params.out.data);
    if (g->state_out) free(g->params.state_out.data);
    st_close(&g->file);
}

/* ---- The two ways to run. ---- */

static deltanet_status run_in_library_threads(const deltanet_params *params, uint32_t threads) {
    return deltanet_run(params, threads);
}

/* What an engine with threads of its own does: one part and one scratch for each thread. The status and message of a
 * part belong to its thread, so they are taken there. */
typedef struct {
    const deltanet_params *params;
    uint32_t ith, nth;
    void *scratch;
    size_t scratch_size;
    deltanet_status status;
    char message[256];
} part;

static void *run_one_part(void *argument) {
    part *p = argument;
    p->status = deltanet_run_part(p->params, p->ith, p->nth, p->scratch, p->scratch_size);
    if (p->status != DELTANET_STATUS_OK) snprintf(p->message, sizeof p->message, "%s", deltanet_last_error());
    return NULL;
}

static deltanet_status run_in_own_threads(const deltanet_params *params, uint32_t threads) {
    size_t scratch_size;
    deltanet_status status = deltanet_scratch_size(params, &scratch_size);
    if (status != DELTANET_STATUS_OK) return status;
    static part parts[MAX_THREADS];
    pthread_t ids[MAX_THREADS];
    unsigned char *scratch = malloc(scratch_size * threads);
    if (!scratch) return DELTANET_STATUS_OUT_OF_MEMORY;
    uint32_t started = 1;
    for (uint32_t i = 0; i < threads; i++) {
        parts[i] = (part){.params = params, .ith = i, .nth = threads, .scratch_size = scratch_size};
        parts[i].scratch = scratch + i * scratch_size;
    }
    while (started < threads && !pthread_create(&ids[started], NULL, run_one_part, &parts[started])) started++;
    run_one_part(&parts[0]);
    for (uint32_t i = 1; i < started; i++) pthread_join(ids[i], NULL);
    /* Parts whose threads could not be had run here: who runs a part, and when, makes no difference. */
    for (uint32_t i = started; i < threads; i++) run_one_part(&parts[i]);
    free(scratch);
    for (uint32_t i = 0; i < threads; i++)
        if (parts[i].status != DELTANET_STATUS_OK) {
            fprintf(stderr, "part %u: %s\n", i, parts[i].message);
            status = parts[i].status;
        }
    return status;
}

typedef deltanet_status (*runner)(const deltanet_params *, uint32_t);

/* The instruction set is a word of the library's description of a call. */
static const char *instruction_set(const deltanet_params *params) {
    static const char *const known[] = {"avx512", "avx2", "scalar"};
    char text[256];
    if (deltanet_describe(params, text, sizeof text) != DELTANET_STATUS_OK) return "none";
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strstr(text, known[i])) return known[i];
    return "unknown";
}

/* Runs, checks and times one case in one way; prints its line; returns whether it is right. */
static int check(golden *g, const char *way, runner run, uint32_t threads, int repeats, double tolerance) {
    /* NaNs first: what the run does not write cannot pass. */
    memset(g->params.out.data, 0xff, g->out->bytes);
    memset(g->params.state_out.data, 0xff, g->state_out->bytes);
    static double times[MAX_REPEATS];
    for (int i = 0; i < repeats; i++) {
        double start = microseconds();
        deltanet_status status = run(&g->params, threads);
        times[i] = microseconds() - start;
        if (status != DELTANET_STATUS_OK) {
            fprintf(stderr, "%s: %s: %s\n", g->name, deltanet_status_name(status), deltanet_last_error());
            return 0;
        }
    }
    qsort(times, (size_t) repeats, sizeof *times, by_value);
    double out = nmse(g->params.out.data, g->out->data, g->out->bytes / sizeof(float));
    double state = nmse(g->params.state_out.data, g->state_out->data, g->state_out->bytes / sizeof(float));
    int right = out <= tolerance && state <= tolerance; /* false for NaN */
    printf("case=%s way=%s isa=%s threads=%u median_us=%.1f nmse_out=%.2e nmse_state=%.2e result=%s\n", g->name, way,
           instruction_set(&g->params), threads, times[repeats / 2], out, state, right ? "ok" : "FAIL");
    return right;
}

static int check_both_ways(const char *path, uint32_t threads, int repeats, double tolerance) {
    static golden g;
    int right = !load(&g, path);
    if (right) {
        right = check(&g, "library_threads", run_in_library_threads, threads, repeats, tolerance);
        void *out = malloc(g.out->bytes + 1), *state = malloc(g.state_out->bytes + 1);
        right = right && out && state;
        if (right) {
            memcpy(out, g.params.out.data, g.out->bytes);
            memcpy(state, g.params.state_out.data, g.state_out->bytes);
            right = check(&g, "own_threads", run_in_own_threads, threads, repeats, tolerance);
            if (memcmp(out, g.params.out.data, g.out->bytes) ||
                memcmp(state, g.params.state_out.data, g.state_out->bytes)) {
                fprintf(stderr, "%s: the two ways to run differ\n", g.name);
                right = 0;
            }
        }
        free(out);
        free(state);
    } else {
        fprintf(stderr, "%s: not a golden case\n", path);
    }
    unload(&g);
    return right;
}

/* What a wrong argument looks like: a status, a sentence, and an output that was not touched. */
static int show_error(const char *path) {
    static golden g;
    int right = !load(&g, path);
    if (right) {
        memset(g.params.out.data, 0xff, g.out->bytes);
        g.params.k.ne[0] += 1;
        deltanet_status status = deltanet_run(&g.params, 1);
        printf("wrong_argument=k.ne[0] status=%s message=\"%s\"\n", deltanet_status_name(status), deltanet_last_error());
        right = status == DELTANET_STATUS_SHAPE && strstr(deltanet_last_error(), "k.ne[0]");
        for (size_t i = 0; i < g.out->bytes; i++) right = right && ((unsigned char *) g.params.out.data)[i] == 0xff;
    }
    unload(&g);
    return right;
}

static long number(const char *text, long least, long most) {
    char *end;
    long value = strtol(text, &end, 10);
    if (end == text || *end || value < least || value > most) {
        fprintf(stderr, "%s is not a number from %ld to %ld\n", text, least, most);
        exit(2);
    }
    return value;
}

int main(int argc, char **argv) {
    uint32_t threads = 2;
    int repeats = 20, at = 1;
    double tolerance = 1e-10;
    for (; at + 1 < argc && argv[at][0] == '-'; at += 2) {
        char option = argv[at][1];
        if (option == 't') threads = (uint32_t) number(argv[at + 1], 1, MAX_THREADS);
        else if (option == 'r') repeats = (int) number(argv[at + 1], 1, MAX_REPEATS);
        else if (option == 'e') tolerance = strtod(argv[at + 1], NULL);
        else break;
    }
    if (at >= argc || argv[at][0] == '-') {
        fprintf(stderr, "usage: %s [-t THREADS] [-r REPEATS] [-e TOLERANCE] FILE.safetensors...\n", argv[0]);
        return 2;
    }
    if (deltanet_version() / 1000000 != DELTANET_VERSION / 1000000) {
        fprintf(stderr, "the library is version %u, the header %d\n", deltanet_version(), DELTANET_VERSION);
        return 1;
    }
    int right = 1;
    for (int i = at; i < argc; i++) right &= check_both_ways(argv[i], threads, repeats, tolerance);
    right &= show_error(argv[at]);
    return right ? 0 : 1;
}
