/* Prints the tokens that ik_llama.cpp continues a fixed prompt with, greedily: a C program that is linked to the engine,
 * with deltanet before it or without.
 *
 * usage: greedy MODEL COUNT THREADS */
#include "llama.h"

#include <stdio.h>
#include <stdlib.h>

static void quiet(enum ggml_log_level level, const char *text, void *data) {
    (void) level, (void) text, (void) data;
}

int main(int argc, char **argv) {
    if (argc != 4) return fprintf(stderr, "usage: greedy MODEL COUNT THREADS\n"), 2;
    int count = atoi(argv[2]), threads = atoi(argv[3]);
    llama_log_set(quiet, NULL);
    llama_backend_init();
    struct llama_model *model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) return fprintf(stderr, "%s does not load\n", argv[1]), 1;
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = 512;
    params.n_threads = params.n_threads_batch = (uint32_t) threads;
    params.flash_attn = false;
    struct llama_context *context = llama_init_from_model(model, params);
    if (!context) return fprintf(stderr, "no context\n"), 1;

    llama_token prompt[77], next = 0;
    for (int i = 0; i < 77; i++) prompt[i] = (7 * i * i + 3 * i + 1) % 256;
    struct llama_batch batch = llama_batch_get_one(prompt, 77, 0, 0);
    printf("tokens:");
    for (int i = 0, at = 77; i < count; i++, at++) {
        if (llama_decode(context, batch) != 0) return fprintf(stderr, "decode failed\n"), 1;
        const float *logits = llama_get_logits_ith(context, -1);
        next = 0;
        for (int token = 1; token < llama_n_vocab(model); token++)
            if (logits[token] > logits[next]) next = token;
        printf(" %d", next);
        batch = llama_batch_get_one(&next, 1, at, 0);
    }
    printf("\n");
    llama_free(context);
    llama_free_model(model);
    llama_backend_free();
    return 0;
}
