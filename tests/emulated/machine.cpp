#include "machine.h"
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include "problem.h"
#include "chunk_tiles.cuh"

namespace emulated {

Thread *self;
Index block_size, grid_size;
uint64_t events;
static ucontext_t scheduler;
static const std::function<void()> *kernel;

void fail(const char *words, long number) {
    fprintf(stderr, "emulated: %s %ld\n", words, number);
    abort();
}

void pause(const char *where) {
    self->where = where;
    swapcontext(&self->context, &scheduler);
}

static void enter() {
    (*kernel)();
    self->done = true;
    events++;
    pause("the end");
}

// The blocks of a cluster, from one thread to the next until all are done.
static void run_cluster(Index first, int size, size_t shared_bytes) {
    constexpr size_t STACK = 128 << 10, ALIGN = 1024;
    static std::vector<std::unique_ptr<Thread>> threads;
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::unique_ptr<Warp>> warps;
    std::vector<std::vector<unsigned char>> memory;
    std::vector<Block *> cluster;
    Meeting meeting;
    const size_t all = (size_t)size * block_size.x;
    while (threads.size() < all) {
        threads.push_back(std::make_unique<Thread>());
        threads.back()->stack.resize(STACK);
    }
    for (size_t i = 0; i < all; i++) {
        Thread &thread = *threads[i];
        const int x = i % block_size.x;
        if (x == 0) {
            memory.emplace_back(shared_bytes + ALIGN, 0xff); // NaN, whatever it is taken for
            blocks.push_back(std::make_unique<Block>());
            Block &block = *blocks.back();
            block.rank = (int)(i / block_size.x);
            block.index = {first.x + block.rank, first.y, first.z};
            block.cluster = &cluster;
            block.cluster_meeting = &meeting;
            block.shared = (unsigned char *)(((uintptr_t)memory.back().data() + ALIGN - 1) / ALIGN * ALIGN);
            block.shared_bytes = shared_bytes;
            cluster.push_back(&block);
        }
        if (x % 32 == 0) warps.push_back(std::make_unique<Warp>());
        thread.index = {x, 0, 0};
        thread.lane = x % 32;
        thread.block = blocks.back().get();
        thread.warp = warps.back().get();
        thread.where = "the beginning";
        thread.done = false;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, enter, 0);
    }
    for (size_t left = all, idle = 0; left > 0;) {
        const uint64_t before = events;
        left = 0;
        for (size_t i = 0; i < all; i++) {
            self = threads[i].get();
            if (self->done) continue;
            left++;
            swapcontext(&scheduler, &self->context);
        }
        idle = events == before ? idle + 1 : 0;
        if (left == 0 || idle < 2) continue;
        std::map<std::string, int> places;
        for (size_t i = 0; i < all; i++)
            if (!threads[i]->done)
                places["rank " + std::to_string(threads[i]->block->rank) + ", warp " + std::to_string(threads[i]->index.x / 32) +
                       ", " + threads[i]->where]++;
        for (const auto &place : places) fprintf(stderr, "emulated: %s: %d threads\n", place.first.c_str(), place.second);
        fail("nobody can go on in block", first.x);
    }
}

static void run_grid(const uint32_t *grid, uint32_t threads, uint32_t cluster, size_t shared_bytes,
                     const std::function<void()> &body) {
    grid_size = {(int)grid[0], (int)grid[1], (int)grid[2]};
    block_size = {(int)threads, 1, 1};
    kernel = &body;
    for (int z = 0; z < grid_size.z; z++)
        for (int y = 0; y < grid_size.y; y++)
            for (int x = 0; x < grid_size.x; x += (int)cluster) run_cluster({x, y, z}, (int)cluster, shared_bytes);
}

template <class T>
static void run(void (*function)(T), const void *argument, const uint32_t *grid, uint32_t threads, uint32_t cluster,
                uint32_t shared_bytes) {
    const T &value = *(const T *)argument;
    run_grid(grid, threads, cluster, shared_bytes, [&] { function(value); });
}

} // namespace emulated

// A launch of each kind of kernel; returns when it is done.
extern "C" void emulate_fast(void (*function)(dn_fast), const void *argument, const uint32_t *grid, uint32_t threads,
                             uint32_t cluster, uint32_t shared_bytes) {
    emulated::run(function, argument, grid, threads, cluster, shared_bytes);
}
extern "C" void emulate_any(void (*function)(dn_problem), const void *argument, const uint32_t *grid, uint32_t threads,
                            uint32_t cluster, uint32_t shared_bytes) {
    emulated::run(function, argument, grid, threads, cluster, shared_bytes);
}
extern "C" void emulate_chunk(void (*function)(dn_chunk_args), const void *argument, const uint32_t *grid, uint32_t threads,
                              uint32_t cluster, uint32_t shared_bytes) {
    emulated::run(function, argument, grid, threads, cluster, shared_bytes);
}
