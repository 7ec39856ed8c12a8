/* The gated delta net from C++: a prompt, then single tokens from the state that it left, in the library's threads and
 * in threads of this program, compared with the equations in double precision.
 *
 *     driver_cpp [SEED]
 *
 * SPDX-License-Identifier: MIT */
#include "deltanet.hpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <future>
#include <random>

namespace {

constexpr std::int64_t S = 64, Hk = 2, Hv = 4, T = 12, PROMPT = 9;

struct inputs {
    std::vector<float> q, k, v, g, beta, state;
};

inputs draw(unsigned seed) {
    std::mt19937 random(seed);
    auto fill = [&](std::int64_t n, float low, float high) {
        std::uniform_real_distribution<float> number(low, high);
        std::vector<float> values(static_cast<std::size_t>(n));
        for (float &value : values) value = number(random);
        return values;
    };
    inputs in{fill(S * Hk * T, -1, 1), fill(S * Hk * T, -1, 1), fill(S * Hv * T, -1, 1),
              fill(Hv * T, -2, 0),     fill(Hv * T, 0, 1),      fill(S * S * Hv, -1, 1)};
    for (std::size_t row = 0; row < in.k.size(); row += S) { /* keys of length 1, as models have them */
        float square = 0;
        for (std::size_t i = 0; i < S; i++) square += in.k[row + i] * in.k[row + i];
        for (std::size_t i = 0; i < S; i++) in.k[row + i] /= std::sqrt(square);
    }
    return in;
}

/* The equations, one token after the other. */
std::vector<double> expected(const inputs &in) {
    std::vector<double> state(in.state.begin(), in.state.end()), out(S * Hv * T);
    for (std::int64_t h = 0; h < Hv; h++)
        for (std::int64_t t = 0; t < T; t++) {
            const float *q = &in.q[S * (h % Hk + Hk * t)], *k = &in.k[S * (h % Hk + Hk * t)];
            const float *v = &in.v[S * (h + Hv * t)];
            double decay = std::exp(double{in.g[h + Hv * t]}), beta = in.beta[h + Hv * t];
            for (std::int64_t j = 0; j < S; j++) {
                double *column = &state[S * (j + S * h)], recalled = 0, sum = 0;
                for (std::int64_t i = 0; i < S; i++) recalled += (column[i] *= decay) * k[i];
                double delta = beta * (v[j] - recalled);
                for (std::int64_t i = 0; i < S; i++) sum += (column[i] += k[i] * delta) * q[i];
                out[j + S * (h + Hv * t)] = sum / std::sqrt(double{S});
            }
        }
    return out;
}

/* The call for `n` tokens from token `first` on, with the state updated in place. */
deltanet::call tokens(inputs &in, std::vector<float> &out, std::int64_t first, std::int64_t n) {
    deltanet::call call;
    auto from = [&](std::vector<float> &all, std::int64_t ne0, std::int64_t heads) {
        deltanet_tensor tensor = deltanet::dense(deltanet::span<const float>(all), {ne0, heads, T, 1});
        tensor.data = all.data() + first * heads * ne0;
        tensor.ne[2] = n;
        return tensor;
    };
    call.q = from(in.q, S, Hk);
    call.k = from(in.k, S, Hk);
    call.v = from(in.v, S, Hv);
    call.g = from(in.g, 1, Hv);
    call.beta = from(in.beta, 1, Hv);
    call.out = from(out, S, Hv);
    call.state_in = call.state_out = deltanet::dense(deltanet::span<const float>(in.state), {S, S, Hv, 1});
    return call;
}

double nmse(const std::vector<float> &got, const std::vector<double> &wanted) {
    double error = 0, power = 0;
    for (std::size_t i = 0; i < wanted.size(); i++) {
        error += (got[i] - wanted[i]) * (got[i] - wanted[i]);
        power += wanted[i] * wanted[i];
    }
    return error / power;
}

} // namespace

int main(int argc, char **argv) try {
    unsigned seed = argc > 1 ? static_cast<unsigned>(std::strtoul(argv[1], nullptr, 10)) : std::random_device{}();
    inputs in = draw(seed);
    const std::vector<double> wanted = expected(in);
    std::vector<float> out(wanted.size(), NAN);

    deltanet::call prompt = tokens(in, out, 0, PROMPT);
    std::printf("library=%s seed=%u plan=\"%s\"\n", deltanet_version_string(), seed, prompt.describe().c_str());
    prompt.run();
    for (std::int64_t t = PROMPT; t < T; t++) {
        const deltanet::call step = tokens(in, out, t, 1);
        deltanet::parts parts(step, 3);
        std::vector<std::future<void>> threads;
        for (std::uint32_t i = 0; i < 3; i++) threads.push_back(std::async(std::launch::async, [&, i] { parts.run(i); }));
        for (auto &thread : threads) thread.get(); /* an exception of a part arrives here */
    }
    double error = nmse(out, wanted);
    bool right = error < 1e-11; /* false for NaN */
    std::printf("tokens=%d nmse_out=%.2e result=%s\n", static_cast<int>(T), error, right ? "ok" : "FAIL");

    try {
        prompt.k.ne[0] += 1;
        prompt.run();
        std::puts("a wrong shape was taken");
        right = false;
    } catch (const deltanet::error &wrong) {
        std::printf("wrong_argument=k.ne[0] status=%s message=\"%s\"\n", deltanet_status_name(wrong.status()), wrong.what());
        right = right && wrong.status() == DELTANET_STATUS_SHAPE;
    }
    try {
        deltanet::dense(deltanet::span<const float>(in.g), {S, Hv, T, 1});
        std::puts("a small span was taken");
        right = false;
    } catch (const std::invalid_argument &) {
    }
    return right ? 0 : 1;
} catch (const std::exception &problem) {
    std::fprintf(stderr, "driver_cpp: %s\n", problem.what());
    return 1;
}
