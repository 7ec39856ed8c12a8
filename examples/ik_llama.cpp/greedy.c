/* Prints the tokens that ik_llama.cpp continues a fixed prompt with, greedily, and how long it took: a C program that is
 * linked to the engine, with deltanet before it or without.
 *
 * usage: greedy MODEL PROMPT COUNT THREADS */
#define _POSIX_C_SOURCE 199309L
#include "llama.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { LONGEST = 4096 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double) t.tv_sec + 1e-9 * (double) t.tv_nsec;
}

static void quiet(enum ggml_log_level level, const char *text, void *data) {
    (void) level, (void) text, (void) data;
}

int main(int argc, char **argv) {
    int length = argc == 5 ? atoi(argv[2]) : 0;
    if (length < 1 || length > LONGEST) return fprintf(stderr, "usage: greedy MODEL PROMPT COUNT THREADS\n"), 2;
    int count = atoi(argv[3]), threads = atoi(argv[4]);
    llama_log_set(quiet, NULL);
    llama_backend_init();
    struct llama_model *model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) return fprintf(stderr, "%s does not load\n", argv[1]), 1;
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = (uint32_t) (length + count + 8);
    params.n_batch = params.n_ubatch = (uint32_t) length;
    params.n_threads = params.n_threads_batch = (uint32_t) threads;
    params.flash_attn = false;
    struct llama_context *context = llama_init_from_model(model, params);
    if (!context) return fprintf(stderr, "no context\n"), 1;

    llama_token prompt[LONGEST], next = 0;
    for (int i = 0; i < length; i++) prompt[i] = (7 * i * i + 3 * i + 1) % 256;
    struct llama_batch batch = llama_batch_get_one(prompt, length, 0, 0);
    double start = now(), middle = start;
    printf("tokens:");
    for (int i = 0; i < count; i++) {
        if (llama_decode(context, batch) != 0) return fprintf(stderr, "decode failed\n"), 1;
        const float *logits = llama_get_logits_ith(context, -1);
        if (i == 0) middle = now();
        next = 0;
        for (int token = 1; token < llama_n_vocab(model); token++)
            if (logits[token] > logits[next]) next = token;
        printf(" %d", next);
        batch = llama_batch_get_one(&next, 1, length + i, 0);
    }
    printf("\nprompt seconds: %g\n", middle - start);
    printf("token seconds: %g\n", count > 1 ? (now() - middle) / (count - 1) : 0.0);
    llama_free(context);
    llama_free_model(model);
    llama_backend_free();
    return 0;
}
