// What the two stages of the chunked kernel hand over: tile images in the workspace, and the walk over chunks.
//
// A tile image is a matrix in bf16, twice (high and low part) in exact mode, in the very byte order in which shared
// memory holds it, so that the scan fetches it with plain contiguous copies.
#pragma once
#include "common.cuh"

typedef struct {
    dn_problem p;
    void *kq;                    // [slot][Hk]: images of K and Q
    void *th;                    // [slot][Hv]: images of T and P, decay vectors
    void *carry;                 // [sequence of the launch][Hv][S][S] f32, key-contiguous: states between slabs
    void *transitions;           // [piece - 1][sequence of the launch][Hv][S][S] f32: see chunk_join.cuh
    void *state_end;             // [B][Hv][S][S], the same, instead of state_out and snapshots; NULL = not wanted
    int32_t seq0, nseq;          // sequences of this launch (cu_seqlens: all of them)
    int32_t chunk0, nchunks;     // chunks of this slab: of every sequence, or with cu_seqlens of all sequences in a row
    int32_t tail;                // tokens at the end of each sequence that are not this kernel's
    int32_t carry_in, carry_out; // slots of carry, one a sequence; with cu_seqlens, where a slab's end cuts one sequence at
                                 // most, one in all. Piece q > 0 of a slab has slot 1 + q.
    int32_t waits;               // when stage 1 waits for the kernel before it: WAITS_*
    int32_t pieces, per_piece;   // of this slab's chunks that are scanned side by side, and chunks of one; 1: in one go
    int32_t shares, share;       // blocks of stage 1 for a chunk of a key head, and value heads of one: 1 or 2
} dn_chunk_args;
static_assert(sizeof(dn_chunk_args) == 600, "chunk args");

// A call's first launch waits before it reads: the inputs are the kernel's before it. One that shares its buffer with the
// scan before it waits before it stores.
enum { WAITS_NOT = 0, WAITS_FIRST = 1, WAITS_TO_STORE = 2 };

// C: tokens of a chunk; PARTS: 2 for high and low parts, 1 for high parts alone.
template <int S, int C, int PARTS>
struct Tiles {
    static constexpr int SUB = C * 128;            // C rows of 64 channels
    static constexpr int KQ_PART = C * S * 2;      // K or Q, one part
    static constexpr int KQ = KQ_PART * PARTS * 2; // K high, K low, Q high, Q low
    static constexpr int ROW = C * 2;              // bytes of a row of T or P
    static constexpr int T_PART = C * ROW;
    static constexpr int T = T_PART * PARTS;
    static constexpr int VEC = 2 * C * 4;          // exp(G_i), exp(G_last - G_i)
    static constexpr int TH = 2 * T + VEC;         // T, P, vectors
    static_assert(S % 64 == 0 && (C == 64 || C == 32), "tile shapes");

    // Row r, channel c (a multiple of 8: 16 bytes stay together) of K or Q.
    __device__ static int kq_offset(int r, int c) { return (c / 64) * SUB + r * 128 + ((((c / 8) & 7) ^ (r & 7)) << 4); }
    // Row r, column c of T or P. Rows of 64 bytes lie two to a bank line, hence the other mask.
    __device__ static int t_offset(int r, int c) {
        return C == 64 ? r * 128 + (((c / 8) ^ (r & 7)) << 4) : r * 64 + (((c / 8) ^ ((r >> 1) & 3)) << 4);
    }
};

template <int C>
__device__ inline int chunks_of(const dn_chunk_args &a, int b) {
    int len = a.p.T;
    if (a.p.cu_seqlens) {
        int64_t begin = dn_index(a.p.cu_seqlens, a.p.cu_i64, b), end = dn_index(a.p.cu_seqlens, a.p.cu_i64, b + 1);
        begin = min(max(begin, (int64_t)0), (int64_t)a.p.T);
        end = min(max(end, begin), (int64_t)a.p.T);
        len = (int)(end - begin);
    }
    return (max(len - a.tail, 0) + C - 1) / C;
}
