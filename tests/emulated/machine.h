// A GPU of one multiprocessor on one CPU thread: a fiber for each CUDA thread, blocks one after another (those of a cluster
// together), barriers, shared memory. What a copy or a product writes is there at once.
#pragma once
#include <cstdint>
#include <cstring>
#include <map>
#include <vector>
#include <ucontext.h>

namespace emulated {

struct Index {
    int x, y, z;
};

[[noreturn]] void fail(const char *words, long number);
// Lets others run until `done`; where nobody can go on, fails and tells where everybody is.
void pause(const char *where);
// Somebody may go on.
extern uint64_t events;
template <class F>
void wait_until(const char *where, F done) {
    while (!done()) pause(where);
    events++;
}

// Where a number of threads meet.
struct Meeting {
    int there = 0, turn = 0;
    void meet(int all) {
        const int mine = turn;
        if (++there == all) there = 0, turn++, events++;
        else wait_until("a barrier", [&] { return turn != mine; });
    }
};

// An mbarrier.
struct Barrier {
    int count = 0, pending = 0, phase = 0;
    long bytes = 0; // announced and not yet there
    void change(int arrivals, long more_bytes) {
        pending -= arrivals, bytes += more_bytes;
        if (pending < 0) fail("more arrivals than a barrier counts", count);
        if (pending == 0 && bytes == 0) pending = count, phase++, events++;
    }
};

struct Warp {
    Meeting all;
    unsigned char words[2][32][64];
};

struct Block {
    Index index;
    int rank; // in its cluster
    std::vector<Block *> *cluster;
    Meeting *cluster_meeting;
    Meeting all, named[16];
    std::map<uint32_t, Barrier> barriers; // by address
    unsigned char *shared;
    size_t shared_bytes;

    Barrier &barrier(uint32_t at) {
        const auto found = barriers.find(at);
        if (found == barriers.end()) fail("no barrier was initialised at", at);
        return found->second;
    }
    unsigned char *at(uint32_t address, size_t bytes) {
        if (address + bytes > shared_bytes) fail("outside shared memory", address);
        return shared + address;
    }
};

struct Thread {
    Index index;
    int lane;
    Block *block;
    Warp *warp;
    ucontext_t context;
    std::vector<char> stack;
    const char *where;
    bool done;
};

extern Thread *self;
extern Index block_size, grid_size;

// What all lanes of the warp bring.
template <class T>
struct Everyones {
    T of[32];
};
template <class T>
Everyones<T> everyones(const T &mine) {
    static_assert(sizeof(T) <= 64, "a lane's words");
    // Two places in turns: who is through here may bring the next before all have read this one.
    auto &words = self->warp->words[self->warp->all.turn & 1];
    memcpy(words[self->lane], &mine, sizeof(T));
    self->warp->all.meet(32);
    Everyones<T> all;
    for (int i = 0; i < 32; i++) memcpy(&all.of[i], words[i], sizeof(T));
    return all;
}

// The block's shared memory, as whatever a kernel calls it.
struct Shared {
    template <class T>
    operator T *() const {
        return (T *)self->block->shared;
    }
};

} // namespace emulated
