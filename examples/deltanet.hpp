/* A thin C++17 face of deltanet.h, to copy and to change: checked spans in, exceptions out, memory that frees itself.
 * SPDX-License-Identifier: MIT */
#pragma once
#include "deltanet.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace deltanet {

/* A status other than OK, with the library's words. */
class error : public std::runtime_error {
  public:
    explicit error(deltanet_status status) : std::runtime_error(deltanet_last_error()), status_(status) {}
    deltanet_status status() const noexcept { return status_; }

  private:
    deltanet_status status_;
};

inline void check(deltanet_status status) {
    if (status != DELTANET_STATUS_OK) throw error(status);
}

/* Elements that somebody else owns, and how many; what std::span is from C++20 on. */
template <class T> struct span {
    T *data;
    std::size_t size;
    template <class Container> span(Container &from) : data(from.data()), size(from.size()) {}
};

/* A dense f32 tensor over a span that is large enough for it; axes as ggml orders them, innermost first. */
inline deltanet_tensor dense(span<const float> from, std::array<std::int64_t, 4> ne) {
    deltanet_tensor tensor{};
    std::size_t bytes = sizeof(float);
    for (std::size_t axis = 0; axis < 4; axis++) {
        tensor.ne[axis] = ne[axis];
        tensor.nb[axis] = bytes;
        bytes *= static_cast<std::size_t>(ne[axis]);
    }
    if (bytes > from.size * sizeof(float)) throw std::invalid_argument("the span is smaller than the tensor");
    tensor.data = const_cast<float *>(from.data); /* the library writes to outputs and states alone */
    tensor.dtype = DELTANET_DTYPE_F32;
    return tensor;
}

/* One call of the operator: fill in the fields, then run it as often as you like. */
struct call : deltanet_params {
    call() : deltanet_params{} { struct_size = sizeof(deltanet_params); }
    void run(std::uint32_t threads = 0) const { check(deltanet_run(this, threads)); }
    std::string describe() const {
        std::string text(256, '\0');
        check(deltanet_describe(this, text.data(), text.size()));
        return text.c_str();
    }
};

/* A call in parts for threads of your own, with the scratch of each part; the call must outlive it. */
class parts {
  public:
    parts(const call &of, std::uint32_t n) : call_(of), scratch_(n) {
        std::size_t bytes = 0;
        check(deltanet_scratch_size(&of, &bytes));
        for (auto &one : scratch_) one.resize(bytes);
    }
    void run(std::uint32_t ith) {
        auto &mine = scratch_.at(ith);
        check(deltanet_run_part(&call_, ith, static_cast<std::uint32_t>(scratch_.size()), mine.data(), mine.size()));
    }

  private:
    const call &call_;
    std::vector<std::vector<unsigned char>> scratch_;
};

} // namespace deltanet
