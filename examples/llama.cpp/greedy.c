/* An engine that embeds llama.cpp, statically or not, and hands deltanet its ggml itself: no plugin path, no environment
 * variable. It continues a prompt of token numbers greedily and says how many nodes deltanet took.
 *
 * build: cc -O2 greedy.c -I<llama.cpp>/include -I<llama.cpp>/ggml/include -I../../include
 *           -L<llama.cpp's libraries> -lllama -lggml -lggml-base -lggml-cpu -L../../target/release -ldeltanet
 * usage: greedy MODEL PROMPT COUNT THREADS [off]      PROMPT tokens in, COUNT tokens out; off leaves deltanet out */
#include "deltanet.h"
#include "ggml-backend.h"
#include "llama.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LONGEST = 4096 };

static const char *op_name(int op) {
    return ggml_op_name((enum ggml_op) op);
}

static bool buffer_is_host(void *buffer) {
    return ggml_backend_buffer_is_host(buffer);
}

/* Before the first CPU backend is made, which is when llama.cpp makes a context. */
static bool attach(void) {
    deltanet_ggml_host host = { .struct_size = sizeof host };
    host.cpu_device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    host.op_name = op_name;
    host.buffer_is_host = buffer_is_host;
    host.tensor_overhead = ggml_tensor_overhead();
    ggml_backend_reg_t registry = deltanet_ggml_attach(&host);
    if (registry) ggml_backend_register(registry);
    return registry != NULL;
}

static void quiet(enum ggml_log_level level, const char *text, void *data) {
    (void) data;
    if (level >= GGML_LOG_LEVEL_WARN || strncmp(text, "deltanet:", 9) == 0) fputs(text, stderr);
}

int main(int argc, char **argv) {
    int length = argc >= 5 ? atoi(argv[2]) : 0;
    if (length < 1 || length > LONGEST) return fprintf(stderr, "usage: greedy MODEL PROMPT COUNT THREADS [off]\n"), 2;
    int count = atoi(argv[3]), threads = atoi(argv[4]);
    llama_log_set(quiet, NULL);
    ggml_backend_load_all();
    llama_backend_init();
    /* Where it cannot take over, everything runs as it would without deltanet. */
    if (argc < 6 && !attach()) fprintf(stderr, "deltanet stays out: %s\n", deltanet_last_error());

    struct llama_model *model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) return fprintf(stderr, "%s does not load\n", argv[1]), 1;
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = (uint32_t) (length + count + 8);
    params.n_batch = params.n_ubatch = (uint32_t) length;
    params.n_threads = params.n_threads_batch = threads;
    struct llama_context *context = llama_init_from_model(model, params);
    if (!context) return fprintf(stderr, "no context\n"), 1;

    const int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_token prompt[LONGEST], next = 0;
    for (int i = 0; i < length; i++) prompt[i] = (7 * i * i + 3 * i + 1) % 256;
    struct llama_batch batch = llama_batch_get_one(prompt, length);
    printf("tokens:");
    for (int i = 0; i < count; i++) {
        if (llama_decode(context, batch) != 0) return fprintf(stderr, "decode failed\n"), 1;
        const float *logits = llama_get_logits_ith(context, -1);
        next = 0;
        for (int token = 1; token < vocabulary; token++)
            if (logits[token] > logits[next]) next = token;
        printf(" %d", next);
        batch = llama_batch_get_one(&next, 1);
    }
    deltanet_ggml_counters counters = { .struct_size = sizeof counters };
    if (deltanet_ggml_read_counters(&counters) != DELTANET_STATUS_OK) return 1;
    printf("\ntaken: %llu\n", (unsigned long long) counters.taken);
    llama_free(context);
    llama_model_free(model);
    llama_backend_free();
    return 0;
}
