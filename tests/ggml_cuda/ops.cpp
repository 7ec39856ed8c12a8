// GGML_OP_GATED_DELTA_NET on a GPU backend against ggml's CPU backend, through ggml's public API: every shape of
// upstream's test list and more, the state copy that ggml-cuda fuses into the operator, and replays of CUDA graphs.
//
//     ops [BOUND]
//     ops time
//
// A JSON object a case on standard output, with the NMSE of out, of the states and of the cache that they are copied to,
// or with the microseconds of one operator and its copy among many in a graph. The exit status is 1 if an NMSE is above
// BOUND (1e-7) or anything else is not as it must be, 77 where there is no GPU.
// SPDX-License-Identifier: MIT
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace {

constexpr int RUNS = 5; // ggml-cuda runs a graph, runs it again, captures it, and replays it from then on
constexpr float POISON = 12345.0f;

struct Case {
    int64_t heads, size, tokens, sequences;
    int     repeat;
    bool    permuted, by_channel;
    int64_t kept;
    int     broadcast  = 1;     // sequences that share q and k
    bool    to_cache   = false; // the states are copied to a cache by the next node
    bool    in_one_row = false; // q, k and v are parts of one row, as after a convolution
    double  lowest     = -20.0; // of the log-decay
};

// Those that are timed: the 0.8b and the 4b8l model's, prompts and generation.
const Case TIMED[] = {
    {16, 128, 512, 1, 1, false, false, 1, 1, true, true, -1.0},  {16, 128, 512, 1, 2, false, false, 1, 1, true, true, -1.0},
    {16, 128, 4096, 1, 1, false, false, 1, 1, true, true, -1.0}, {16, 128, 4096, 1, 2, false, false, 1, 1, true, true, -1.0},
    {16, 128, 1, 1, 1, false, false, 1, 1, true, true, -1.0},    {16, 128, 1, 1, 2, false, false, 1, 1, true, true, -1.0},
    {16, 128, 1, 32, 1, false, false, 1, 1, true, true, -1.0},   {16, 128, 1, 32, 2, false, false, 1, 1, true, true, -1.0},
    {16, 128, 4, 1, 2, false, false, 4, 1, true, true, -1.0},
};

// Upstream's list (tests/test-backend-ops.cpp: heads, head size, tokens, sequences, repeat, permuted, KDA, K), its
// performance cases, then what models do.
const Case CASES[] = {
    {32, 128, 1, 1, 1, false, false, 1}, {32, 16, 1, 1, 1, false, false, 1}, {32, 16, 1, 1, 1, true, true, 1},
    {32, 16, 1, 1, 1, false, true, 1},   {16, 64, 1, 2, 1, false, false, 1}, {4, 64, 4, 1, 1, false, false, 1},
    {4, 64, 4, 2, 1, false, false, 1},   {8, 32, 4, 2, 2, false, false, 1},  {4, 64, 4, 2, 1, true, false, 1},
    {4, 64, 4, 1, 1, true, false, 1},    {4, 64, 1, 1, 1, false, true, 1},   {4, 64, 1, 2, 1, false, true, 1},
    {4, 16, 1, 2, 1, false, true, 1},    {4, 32, 4, 1, 1, false, true, 1},   {4, 64, 4, 2, 1, false, true, 1},
    {8, 32, 4, 2, 2, false, true, 1},    {4, 64, 4, 2, 1, true, true, 1},    {4, 16, 4, 2, 1, true, true, 1},
    {4, 64, 64, 1, 1, false, false, 1},  {4, 64, 127, 1, 1, false, false, 1}, {4, 64, 256, 1, 1, false, false, 1},
    {4, 64, 65, 1, 1, false, false, 1},  {4, 64, 100, 1, 1, false, false, 1}, {4, 64, 200, 1, 1, false, false, 1},
    {4, 64, 127, 2, 1, false, false, 1}, {4, 64, 64, 1, 1, false, true, 1},  {4, 64, 33, 1, 1, false, true, 1},
    {4, 64, 100, 1, 1, false, true, 1},  {4, 16, 2, 1, 1, false, false, 2},  {4, 32, 4, 1, 1, false, false, 4},
    {4, 64, 4, 2, 1, false, false, 4},   {8, 128, 4, 1, 1, false, false, 4}, {4, 64, 4, 2, 1, false, true, 4},
    {8, 32, 4, 2, 2, false, true, 4},    {4, 32, 8, 1, 1, false, false, 3},  {4, 64, 16, 2, 1, false, false, 4},
    {16, 64, 1, 1, 1, false, false, 1},  {32, 128, 1, 1, 1, false, true, 1}, {32, 128, 64, 1, 1, false, false, 1},
    {32, 128, 256, 1, 1, false, false, 1}, {32, 128, 512, 1, 1, false, false, 1},
    {32, 128, 1024, 1, 1, false, false, 1}, {4, 128, 64, 1, 1, false, false, 1}, {4, 128, 256, 1, 1, false, false, 1},
    {4, 128, 512, 1, 1, false, false, 1}, {4, 128, 1024, 1, 1, false, false, 1}, {32, 128, 64, 1, 1, false, true, 1},
    // Fewer tokens than kept states, prompts with kept states, shared q and k, the cache, rows of a convolution.
    {4, 64, 2, 2, 1, false, false, 4},
    {4, 128, 100, 2, 2, false, false, 3},
    {4, 64, 3, 4, 1, false, false, 1, 2},
    {4, 64, 70, 4, 2, false, false, 1, 2},
    {16, 128, 1, 1, 2, false, false, 1, 1, true, true},
    {16, 128, 1, 32, 2, false, false, 1, 1, true, true},
    {16, 128, 512, 1, 2, false, false, 1, 1, true, true, -1.0},
    {16, 128, 129, 3, 2, false, false, 1, 1, true, true, -0.01},
    {16, 128, 3, 2, 2, false, false, 4, 1, true, true},
    {16, 128, 8, 2, 2, false, false, 4, 1, true, true},
    {16, 128, 200, 2, 2, false, false, 4, 1, true, true, -0.1},
    {8, 64, 130, 2, 1, true, true, 2, 1, true},
};

struct Graph {
    ggml_context * context = nullptr;
    ggml_cgraph *  nodes   = nullptr;
    ggml_tensor *  out     = nullptr;
    ggml_tensor *  cache   = nullptr;
    std::vector<ggml_tensor *> inputs; // q, k, v (or all in one), g, beta, state
};

ggml_tensor * new_input(Graph & graph, int64_t n0, int64_t n1, int64_t n2, int64_t n3) {
    graph.inputs.push_back(ggml_new_tensor_4d(graph.context, GGML_TYPE_F32, n0, n1, n2, n3));
    return graph.inputs.back();
}

// `operators` of them, each with its copy, on the same inputs.
Graph build(const Case & c, int operators = 1) {
    Graph graph;
    graph.context = ggml_init({ ggml_tensor_overhead() * (64 + 8 * operators) + ggml_graph_overhead(), nullptr, true });
    ggml_context * ctx = graph.context;
    const int64_t values = c.heads * c.repeat, shared = c.sequences / c.broadcast;
    ggml_tensor *q, *k, *v;
    if (c.in_one_row) {
        const int64_t row = c.size * (2 * c.heads + values);
        ggml_tensor * all = new_input(graph, row, c.tokens, c.sequences, 1);
        const auto part = [&](int64_t first, int64_t heads) {
            return ggml_view_4d(ctx, all, c.size, heads, c.tokens, c.sequences, c.size * sizeof(float), all->nb[1],
                                all->nb[2], first * c.size * sizeof(float));
        };
        q = part(0, c.heads), k = part(c.heads, c.heads), v = part(2 * c.heads, values);
    } else if (c.permuted) {
        const auto swapped = [&](int64_t heads, int64_t sequences) {
            return ggml_permute(ctx, new_input(graph, c.size, c.tokens, heads, sequences), 0, 2, 1, 3);
        };
        q = swapped(c.heads, shared), k = swapped(c.heads, shared), v = swapped(values, c.sequences);
    } else {
        q = new_input(graph, c.size, c.heads, c.tokens, shared);
        k = new_input(graph, c.size, c.heads, c.tokens, shared);
        v = new_input(graph, c.size, values, c.tokens, c.sequences);
    }
    ggml_tensor * g     = new_input(graph, c.by_channel ? c.size : 1, values, c.tokens, c.sequences);
    ggml_tensor * beta  = new_input(graph, 1, values, c.tokens, c.sequences);
    ggml_tensor * state = new_input(graph, c.size, c.size, values, c.sequences);
    q = ggml_l2_norm(ctx, q, 1e-6f), k = ggml_l2_norm(ctx, k, 1e-6f); // as models do
    graph.nodes = ggml_new_graph(ctx);
    for (int i = 0; i < operators; i++) {
        graph.out = ggml_gated_delta_net(ctx, q, k, v, g, beta, state, c.kept);
        ggml_build_forward_expand(graph.nodes, graph.out);
        if (!c.to_cache) continue;
        // As llama.cpp has it: the newest states, one sequence after the other, at a stride of the cache's own.
        const int64_t d = c.size * c.size * values, written = std::min(c.tokens, c.kept), rows = c.sequences + 1;
        graph.cache = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, d, rows, c.kept);
        ggml_tensor * from = ggml_view_3d(ctx, graph.out, d, c.sequences, written, d * sizeof(float),
            d * c.sequences * sizeof(float), c.size * values * c.tokens * c.sequences * sizeof(float));
        ggml_tensor * to = ggml_view_3d(ctx, graph.cache, d, c.sequences, written, graph.cache->nb[1], graph.cache->nb[2], 0);
        ggml_build_forward_expand(graph.nodes, ggml_cpy(ctx, from, to));
    }
    return graph;
}

std::vector<float> read(const ggml_tensor * tensor) {
    std::vector<float> values(tensor ? ggml_nelements(tensor) : 0);
    if (tensor) ggml_backend_tensor_get(tensor, values.data(), 0, ggml_nbytes(tensor));
    return values;
}

void poison(ggml_tensor * tensor) {
    if (!tensor) return;
    const std::vector<float> values(ggml_nelements(tensor), POISON);
    ggml_backend_tensor_set(tensor, values.data(), 0, ggml_nbytes(tensor));
}

// Squared error over squared expectation; a NaN anywhere makes it NaN.
double nmse(const std::vector<float> & got, const std::vector<float> & expected, size_t from, size_t to) {
    double error = 0.0, norm = 0.0;
    for (size_t i = from; i < to; i++) {
        const double difference = double(got[i]) - double(expected[i]);
        error += difference * difference, norm += double(expected[i]) * double(expected[i]);
    }
    return norm > 0.0 ? error / norm : error;
}

std::string text(double value) {
    char words[32];
    if (!std::isfinite(value)) return "null";
    snprintf(words, sizeof words, "%.3g", value);
    return words;
}

int graphs_captured = 0;
std::string served; // what the drop-in says of itself

void log(ggml_log_level level, const char * words, void *) {
    if (strstr(words, "CUDA graph warmup complete")) graphs_captured++;
    if (strncmp(words, "deltanet ", 9) == 0) served = words;
    if (level == GGML_LOG_LEVEL_ERROR || (level == GGML_LOG_LEVEL_WARN && getenv("VERBOSE"))) fputs(words, stderr);
}

// Random values for all inputs, the same in all graphs.
void fill(const Case & c, std::vector<Graph *> graphs, std::mt19937 & random) {
    const size_t count = graphs[0]->inputs.size();
    for (size_t i = 0; i < count; i++) {
        const size_t role = count - 1 - i; // 0 state, 1 beta, 2 g, then v, k, q
        const double low = role == 1 ? 0.0 : role == 2 ? c.lowest : role == 3 && !c.in_one_row ? -0.3 : -1.0;
        const double high = role == 2 ? -1e-4 : role == 3 && !c.in_one_row ? 5.0 : 1.0;
        std::uniform_real_distribution<float> draw{ float(low), float(high) };
        std::vector<float> values(ggml_nelements(graphs[0]->inputs[i]));
        for (float & value : values) value = draw(random);
        for (Graph * graph : graphs)
            ggml_backend_tensor_set(graph->inputs[i], values.data(), 0, values.size() * sizeof(float));
    }
}

void time_one(const Case & c, ggml_backend_t gpu, std::mt19937 & random) {
    const int operators = c.tokens > 1024 ? 4 : 16;
    Graph graph = build(c, operators);
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(graph.context, gpu);
    fill(c, { &graph }, random);
    std::vector<double> times;
    for (int turn = 0; turn < 40; turn++) {
        const auto start = std::chrono::steady_clock::now();
        ggml_backend_graph_compute(gpu, graph.nodes);
        ggml_backend_synchronize(gpu);
        const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - start;
        if (turn >= RUNS) times.push_back(time.count() / operators);
    }
    std::sort(times.begin(), times.end());
    printf("{\"heads\": %d, \"value_heads\": %d, \"head_size\": %d, \"tokens\": %d, \"sequences\": %d, \"K\": %d, \"us\": %.2f}\n",
           int(c.heads), int(c.heads * c.repeat), int(c.size), int(c.tokens), int(c.sequences), int(c.kept),
           times[times.size() / 2]);
    ggml_backend_buffer_free(buffer), ggml_free(graph.context);
}

bool run(const Case & c, ggml_backend_t cpu, ggml_backend_t gpu, double bound, std::mt19937 & random) {
    Graph graphs[2] = { build(c), build(c) };
    ggml_backend_t backends[2] = { cpu, gpu };
    ggml_backend_buffer_t buffers[2];
    for (int i = 0; i < 2; i++) buffers[i] = ggml_backend_alloc_ctx_tensors(graphs[i].context, backends[i]);
    fill(c, { &graphs[0], &graphs[1] }, random);

    const size_t out = size_t(c.size * c.heads * c.repeat * c.tokens * c.sequences);
    const size_t state = size_t(c.size * c.size * c.heads * c.repeat), step = state * c.sequences;
    const size_t written = size_t(std::min(c.tokens, c.kept));
    double worst_out = 0.0, worst_state = 0.0, worst_cache = 0.0;
    bool ok = true, untouched = true, replays = true;
    std::vector<float> expected, expected_cache, first, first_cache;
    for (int turn = 0; turn <= RUNS; turn++) {
        const int i = turn > 0;
        poison(graphs[i].out), poison(graphs[i].cache);
        ok = ok && ggml_backend_graph_compute(backends[i], graphs[i].nodes) == GGML_STATUS_SUCCESS;
        ggml_backend_synchronize(backends[i]);
        const std::vector<float> got = read(graphs[i].out), cache = read(graphs[i].cache);
        if (i == 0) {
            expected = got, expected_cache = cache;
            continue;
        }
        const auto worse = [](double & worst, double error) { if (!(error <= worst)) worst = error; };
        worse(worst_out, nmse(got, expected, 0, out));
        // With the copy fused into the operator the states are in the cache alone.
        if (c.to_cache) {
            for (size_t slot = 0; slot < size_t(c.kept); slot++) {
                const size_t at = slot * (step + state);
                if (slot < written) worse(worst_cache, nmse(cache, expected_cache, at, at + step));
                for (size_t e = at + (slot < written ? step : 0); e < at + step + state; e++)
                    untouched = untouched && cache[e] == POISON;
            }
        } else {
            for (size_t slot = 0; slot < size_t(c.kept); slot++) {
                const size_t at = out + slot * step;
                if (slot < written) worse(worst_state, nmse(got, expected, at, at + step));
                else for (size_t e = at; e < at + step; e++) untouched = untouched && got[e] == POISON;
            }
        }
        if (turn == 1) first = got, first_cache = cache;
        replays = replays && memcmp(got.data(), first.data(), out * sizeof(float)) == 0 && cache == first_cache;
    }
    // Not "above": a NaN fails too.
    ok = ok && worst_out <= bound && worst_state <= bound && worst_cache <= bound && untouched && replays;
    printf("{\"heads\": %d, \"head_size\": %d, \"tokens\": %d, \"sequences\": %d, \"v_repeat\": %d, \"permuted\": %s, "
           "\"kda\": %s, \"K\": %d, \"q_shared_by\": %d, \"cache\": %s, \"one_row\": %s, \"lowest_g\": %g, "
           "\"out\": %s, \"state\": %s, \"cache_state\": %s, \"untouched\": %s, \"replays_equal\": %s, \"ok\": %s}\n",
           int(c.heads), int(c.size), int(c.tokens), int(c.sequences), c.repeat, c.permuted ? "true" : "false",
           c.by_channel ? "true" : "false", int(c.kept), c.broadcast, c.to_cache ? "true" : "false",
           c.in_one_row ? "true" : "false", c.lowest, text(worst_out).c_str(), text(worst_state).c_str(),
           text(worst_cache).c_str(), untouched ? "true" : "false", replays ? "true" : "false", ok ? "true" : "false");
    fflush(stdout);
    for (int i = 0; i < 2; i++) ggml_backend_buffer_free(buffers[i]), ggml_free(graphs[i].context);
    return ok;
}

} // namespace

int main(int argc, char ** argv) {
    const double bound = argc > 1 ? atof(argv[1]) : 1e-7;
    ggml_log_set(log, nullptr);
    ggml_backend_load_all();
    // DEVICE=cpu: the CPU against itself, to try the program where there is no GPU.
    const bool itself = getenv("DEVICE") && strcmp(getenv("DEVICE"), "cpu") == 0;
    ggml_backend_dev_t device = ggml_backend_dev_by_type(itself ? GGML_BACKEND_DEVICE_TYPE_CPU : GGML_BACKEND_DEVICE_TYPE_GPU);
    if (!device) return fprintf(stderr, "ops: no GPU\n"), 77;
    ggml_backend_t cpu = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
    ggml_backend_t gpu = ggml_backend_dev_init(device, nullptr);
    if (!cpu || !gpu) return fprintf(stderr, "ops: a backend did not start\n"), 1;
    const unsigned seed = getenv("SEED") ? unsigned(atol(getenv("SEED"))) : std::random_device{}();
    std::mt19937 random(seed);
    if (argc > 1 && strcmp(argv[1], "time") == 0) {
        for (const Case & c : TIMED) time_one(c, gpu, random);
        return 0;
    }
    int failed = 0;
    for (const Case & c : CASES) failed += !run(c, cpu, gpu, bound, random);
    served.erase(std::remove(served.begin(), served.end(), '\n'), served.end());
    printf("{\"summary\": true, \"device\": \"%s\", \"cases\": %zu, \"failed\": %d, \"seed\": %u, \"graphs_captured\": %d, "
           "\"says\": \"%s\"}\n", ggml_backend_dev_description(device), sizeof CASES / sizeof *CASES, failed, seed,
           graphs_captured, served.c_str());
    return failed > 0;
}
