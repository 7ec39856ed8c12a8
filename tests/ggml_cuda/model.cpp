// A model in llama.cpp on its GPU: how fast, and which tokens.
//
//     model FILE speed [PROMPT] [GENERATE] [ROUNDS]
//     model FILE greedy PROMPT GENERATE [LOGITS]
//
// One JSON object on standard output. speed: tokens a second, medians: prompts in parts of 512 and of 4096, one sequence
// generating, 32 of them. greedy: the tokens, and the logits that they were chosen by as f32 in the file LOGITS.
// SPDX-License-Identifier: MIT
#include "ggml-backend.h"
#include "llama.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

std::string served; // what the drop-in says of itself

void log(ggml_log_level level, const char * words, void *) {
    if (strncmp(words, "deltanet ", 9) == 0) served = words;
    if (level == GGML_LOG_LEVEL_ERROR || getenv("VERBOSE")) fputs(words, stderr);
}

[[noreturn]] void fail(const char * what) {
    fprintf(stderr, "model: %s failed\n", what);
    exit(1);
}

struct Run {
    llama_context * context;
    llama_batch batch;

    Run(llama_model * model, int tokens, int sequences, int part) {
        llama_context_params params = llama_context_default_params();
        params.n_ctx = tokens * sequences;
        params.n_batch = std::max(tokens, sequences), params.n_ubatch = part, params.n_seq_max = sequences;
        params.n_threads = params.n_threads_batch = 4;
        context = llama_init_from_model(model, params);
        if (!context) fail("llama_init_from_model");
        batch = llama_batch_init(std::max(tokens, sequences), 0, 1);
    }
    ~Run() { llama_batch_free(batch), llama_free(context); }
    Run(const Run &) = delete;

    void clear() { llama_memory_clear(llama_get_memory(context), true), batch.n_tokens = 0; }
    void add(llama_token token, int position, int sequence, bool logits) {
        const int i = batch.n_tokens++;
        batch.token[i] = token, batch.pos[i] = position, batch.logits[i] = logits;
        batch.n_seq_id[i] = 1, batch.seq_id[i][0] = sequence;
    }
    // Milliseconds until the device is done.
    double decode() {
        const auto start = std::chrono::steady_clock::now();
        if (llama_decode(context, batch)) fail("llama_decode");
        llama_synchronize(context);
        batch.n_tokens = 0;
        return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    }
};

double median(std::vector<double> times) {
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

// Pseudo-random tokens, the same for every build.
llama_token token_at(int i, int vocabulary) { return llama_token((i * 2654435761u >> 8) % unsigned(vocabulary)); }

double prompt_speed(llama_model * model, int vocabulary, int tokens, int part, int rounds) {
    Run run(model, tokens + 64, 1, part);
    std::vector<double> times;
    for (int round = -1; round < rounds; round++) { // the first warms up
        run.clear();
        for (int i = 0; i < tokens; i++) run.add(token_at(i, vocabulary), i, 0, i == tokens - 1);
        const double time = run.decode();
        if (round >= 0) times.push_back(time);
    }
    return 1e3 * tokens / median(times);
}

double generation_speed(llama_model * model, int vocabulary, int tokens, int sequences) {
    Run run(model, tokens + 64, sequences, 512);
    std::vector<double> times;
    for (int i = 0; i < tokens; i++) {
        for (int s = 0; s < sequences; s++) run.add(token_at(i + 977 * s, vocabulary), i, s, true);
        const double time = run.decode();
        if (i >= tokens / 4) times.push_back(time); // graphs are captured by then
    }
    return 1e3 * sequences / median(times);
}

void greedy(llama_model * model, int vocabulary, int prompt, int generate, const char * logits_file) {
    Run run(model, prompt + generate + 64, 1, 512);
    FILE * file = logits_file ? fopen(logits_file, "wb") : nullptr;
    for (int i = 0; i < prompt; i++) run.add(token_at(i, vocabulary), i, 0, i == prompt - 1);
    printf("\"tokens\": [");
    for (int i = 0; i < generate; i++) {
        run.decode();
        const float * logits = llama_get_logits_ith(run.context, -1);
        if (!logits) fail("llama_get_logits_ith");
        if (file && fwrite(logits, sizeof *logits, vocabulary, file) != size_t(vocabulary)) fail("fwrite");
        const llama_token token = llama_token(std::max_element(logits, logits + vocabulary) - logits);
        printf("%s%d", i ? ", " : "", token);
        run.add(token, prompt + i, 0, true);
    }
    printf("]");
    if (file) fclose(file);
}

// Which CUDA backend this process has loaded: the two builds differ in that file.
std::string backend_path() {
    std::string found;
    if (FILE * maps = fopen("/proc/self/maps", "r")) {
        char line[4096];
        while (fgets(line, sizeof line, maps)) {
            char * path = strchr(line, '/');
            if (path && strstr(path, "libggml-cuda")) found.assign(path, strcspn(path, "\n"));
        }
        fclose(maps);
    }
    return found;
}

} // namespace

int main(int argc, char ** argv) {
    if (argc < 3) return fprintf(stderr, "usage: %s FILE speed|greedy ...\n", argv[0]), 2;
    const auto number = [&](int i, int otherwise) { return argc > i ? atoi(argv[i]) : otherwise; };
    llama_log_set(log, nullptr);
    llama_backend_init();
    ggml_backend_load_all();
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = getenv("NGL") ? atoi(getenv("NGL")) : 99;
    llama_model * model = llama_model_load_from_file(argv[1], params);
    if (!model) fail("llama_model_load_from_file");
    const int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    printf("{");
    if (strcmp(argv[2], "speed") == 0) {
        const int prompt = number(3, 4096), generate = number(4, 128), rounds = number(5, 5);
        printf("\"pp\": %.1f, ", prompt_speed(model, vocabulary, prompt, 512, rounds));
        printf("\"pp_ubatch_4096\": %.1f, ", prompt_speed(model, vocabulary, prompt, 4096, rounds));
        printf("\"tg\": %.1f, ", generation_speed(model, vocabulary, generate, 1));
        printf("\"tg_32_sequences\": %.1f", generation_speed(model, vocabulary, generate, 32));
    } else {
        greedy(model, vocabulary, number(3, 100), number(4, 32), argc > 5 ? argv[5] : nullptr);
    }
    served.erase(std::remove(served.begin(), served.end(), '\n'), served.end());
    printf(", \"backend\": \"%s\", \"says\": \"%s\"}\n", backend_path().c_str(), served.c_str());
    llama_model_free(model);
    return 0;
}
