/* The gated delta net on a GPU through libdeltanet, from plain C: the CUDA driver API for memory and streams, found at
 * run time, so that this builds and starts anywhere.
 *
 *     driver_cuda [HEAD_SIZE] [TOKENS] [SEQUENCES]
 *
 * Random tensors go through deltanet_run on the CPU and through deltanet_cuda_run on the first device, twice: on a
 * stream, and replayed from a captured graph. One line of `key=value` words a run; the exit status is 1 if anything is
 * not as it must be, and 77 where there is no driver or device.
 * SPDX-License-Identifier: MIT */
#define _POSIX_C_SOURCE 200809L
#include "deltanet.h"

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SKIPPED = 77, KEY_HEADS = 2, VALUE_HEADS = 4 };

/* ---- The driver functions that this program uses, as cuda.h declares them. A program that includes cuda.h and links
 * with libcuda has no need of this. ---- */

typedef unsigned long long device_pointer;
typedef struct CUctx_st *context;
typedef struct CUstream_st *stream;
typedef struct CUgraph_st *graph;
typedef struct CUgraphExec_st *executable;

static struct {
    int (*init)(unsigned);
    int (*device)(int *, int);
    int (*retain)(context *, int);
    int (*set_current)(context);
    int (*allocate)(device_pointer *, size_t);
    int (*release)(device_pointer);
    int (*to_device)(device_pointer, const void *, size_t);
    int (*to_host)(void *, device_pointer, size_t);
    int (*fill)(device_pointer, unsigned char, size_t);
    int (*new_stream)(stream *, unsigned);
    int (*wait)(stream);
    int (*begin)(stream, int);
    int (*end)(stream, graph *);
    int (*instantiate)(executable *, graph, unsigned long long);
    int (*launch)(executable, stream);
} cuda;

/* ISO C has no conversion from an object to a function pointer; POSIX has this one. */
static int look_up(void *library, const char *name, void *function) {
    void *symbol = dlsym(library, name);
    memcpy(function, &symbol, sizeof symbol);
    return symbol ? 0 : -1;
}

static int load_driver(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) return -1;
    return look_up(library, "cuInit", &cuda.init) || look_up(library, "cuDeviceGet", &cuda.device) ||
           look_up(library, "cuDevicePrimaryCtxRetain", &cuda.retain) ||
           look_up(library, "cuCtxSetCurrent", &cuda.set_current) || look_up(library, "cuMemAlloc_v2", &cuda.allocate) ||
           look_up(library, "cuMemFree_v2", &cuda.release) || look_up(library, "cuMemcpyHtoD_v2", &cuda.to_device) ||
           look_up(library, "cuMemcpyDtoH_v2", &cuda.to_host) || look_up(library, "cuMemsetD8_v2", &cuda.fill) ||
           look_up(library, "cuStreamCreate", &cuda.new_stream) ||
           look_up(library, "cuStreamSynchronize", &cuda.wait) ||
           look_up(library, "cuStreamBeginCapture_v2", &cuda.begin) ||
           look_up(library, "cuStreamEndCapture", &cuda.end) ||
           look_up(library, "cuGraphInstantiateWithFlags", &cuda.instantiate) ||
           look_up(library, "cuGraphLaunch", &cuda.launch);
}

/* ---- A problem: dense f32 tensors in ggml's axes, on the host. ---- */

static deltanet_tensor dense(int64_t n0, int64_t n1, int64_t n2, int64_t n3) {
    deltanet_tensor t = {.ne = {n0, n1, n2, n3}, .dtype = DELTANET_DTYPE_F32};
    t.nb[0] = sizeof(float);
    for (int axis = 1; axis < 4; axis++) t.nb[axis] = t.nb[axis - 1] * (size_t) t.ne[axis - 1];
    t.data = malloc(t.nb[3] * (size_t) n3 + 1);
    return t;
}

static size_t bytes(const deltanet_tensor *t) { return t->nb[3] * (size_t) t->ne[3]; }

static void randomise(const deltanet_tensor *t, float low, float high) {
    float *x = t->data;
    for (size_t i = 0; i < bytes(t) / sizeof *x; i++) x[i] = low + (high - low) * (float) rand() / (float) RAND_MAX;
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

/* ---- The run on the GPU. ---- */

static int refused(const char *what, deltanet_status status) {
    if (status == DELTANET_STATUS_OK) return 0;
    fprintf(stderr, "%s: %s\n", what, deltanet_last_error());
    return 1;
}

static int failed(const char *what, int code) {
    if (code == 0) return 0;
    fprintf(stderr, "%s: CUDA error %d\n", what, code);
    return 1;
}

/* The tensors of a call, and whether the GPU reads them. */
static deltanet_tensor *tensor_at(deltanet_params *p, int i) {
    deltanet_tensor *all[] = {&p->q, &p->k, &p->v, &p->g, &p->beta, &p->state_in, &p->out, &p->state_out};
    return all[i];
}
enum { TENSORS = 8, INPUTS = 6, OUT = 6, STATE_OUT = 7 };

/* Compares what the GPU wrote with the host's, and poisons it for the next run. */
static int compare(const char *way, const deltanet_params *device, const deltanet_params *host) {
    double error[2];
    for (int i = 0; i < 2; i++) {
        const deltanet_tensor *d = i ? &device->state_out : &device->out, *h = i ? &host->state_out : &host->out;
        float *got = malloc(bytes(h));
        if (!got || failed("copy back", cuda.to_host(got, (device_pointer) (uintptr_t) d->data, bytes(h)))) return 1;
        error[i] = nmse(got, h->data, bytes(h) / sizeof *got);
        free(got);
        if (failed("poison", cuda.fill((device_pointer) (uintptr_t) d->data, 0xff, bytes(h)))) return 1;
    }
    int ok = error[0] <= 1e-9 && error[1] <= 1e-9; /* false for a NaN */
    printf("way=%s out=%.2e state=%.2e %s\n", way, error[0], error[1], ok ? "ok" : "FAIL");
    return !ok;
}

int main(int argc, char **argv) {
    int64_t s = argc > 1 ? atoi(argv[1]) : 128, tokens = argc > 2 ? atoi(argv[2]) : 5;
    int64_t sequences = argc > 3 ? atoi(argv[3]) : 2;
    deltanet_params host = {.struct_size = sizeof host};
    host.q = dense(s, KEY_HEADS, tokens, sequences), host.k = dense(s, KEY_HEADS, tokens, sequences);
    host.v = dense(s, VALUE_HEADS, tokens, sequences), host.out = dense(s, VALUE_HEADS, tokens, sequences);
    host.g = dense(1, VALUE_HEADS, tokens, sequences), host.beta = dense(1, VALUE_HEADS, tokens, sequences);
    host.state_in = dense(s, s, VALUE_HEADS, sequences), host.state_out = dense(s, s, VALUE_HEADS, sequences);
    host.qk_norm = 1, host.qk_norm_eps = 1e-6f;
    for (int i = 0; i < TENSORS; i++)
        if (!tensor_at(&host, i)->data) return fprintf(stderr, "no memory\n"), 1;
    randomise(&host.q, -1, 1), randomise(&host.k, -1, 1), randomise(&host.v, -1, 1);
    randomise(&host.g, -1, 0), randomise(&host.beta, 0, 1), randomise(&host.state_in, -1, 1);
    if (refused("deltanet_run", deltanet_run(&host, 0))) return 1;

    context primary;
    int device;
    if (load_driver() || cuda.init(0) || cuda.device(&device, 0)) {
        printf("SKIPPED: no CUDA driver or device\n");
        return SKIPPED;
    }
    if (failed("context", cuda.retain(&primary, device)) || failed("context", cuda.set_current(primary))) return 1;
    /* Once in each context, and not in a capture: loads the kernels. */
    if (refused("deltanet_cuda_prepare", deltanet_cuda_prepare())) return 1;

    /* The same problem with the tensors in device memory; the strides stay. */
    deltanet_params on_device = host;
    for (int i = 0; i < TENSORS; i++) {
        deltanet_tensor *t = tensor_at(&on_device, i);
        device_pointer address;
        if (failed("allocation", cuda.allocate(&address, bytes(t)))) return 1;
        if (i < INPUTS ? failed("copy", cuda.to_device(address, t->data, bytes(t)))
                       : failed("poison", cuda.fill(address, 0xff, bytes(t))))
            return 1;
        t->data = (void *) (uintptr_t) address;
    }
    size_t size;
    device_pointer workspace = 0;
    if (refused("deltanet_cuda_workspace_size", deltanet_cuda_workspace_size(&on_device, &size))) return 1;
    if (size && failed("workspace", cuda.allocate(&workspace, size))) return 1;

    stream queue;
    if (failed("stream", cuda.new_stream(&queue, 1 /* non-blocking */))) return 1;
    if (refused("deltanet_cuda_run", deltanet_cuda_run(&on_device, (void *) (uintptr_t) workspace, size, queue)) ||
        failed("stream", cuda.wait(queue)) || compare("stream", &on_device, &host))
        return 1;

    graph captured;
    executable ready;
    if (failed("capture", cuda.begin(queue, 0 /* global */)) ||
        refused("deltanet_cuda_run", deltanet_cuda_run(&on_device, (void *) (uintptr_t) workspace, size, queue)) ||
        failed("capture", cuda.end(queue, &captured)) || failed("graph", cuda.instantiate(&ready, captured, 0)) ||
        failed("graph", cuda.launch(ready, queue)) || failed("stream", cuda.wait(queue)) ||
        compare("graph", &on_device, &host))
        return 1;

    /* A mistake is a status and words, and nothing is queued: here, memory of the host. */
    deltanet_params wrong = on_device;
    wrong.beta.data = host.beta.data;
    if (deltanet_cuda_run(&wrong, (void *) (uintptr_t) workspace, size, queue) != DELTANET_STATUS_CUDA) {
        fprintf(stderr, "host memory was taken for the device's\n");
        return 1;
    }
    printf("refused=%s\n", deltanet_last_error());
    for (int i = 0; i < TENSORS; i++) {
        cuda.release((device_pointer) (uintptr_t) tensor_at(&on_device, i)->data);
        free(tensor_at(&host, i)->data);
    }
    if (workspace) cuda.release(workspace);
    return 0;
}
