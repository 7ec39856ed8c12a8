//! What the gates and betas of a value head make of a chunk: every decay between two of its tokens.

use super::chunked::{MAX_CHUNK, PITCH, Scratch};
use super::simd::{MAX_LANES, Simd};
use super::token::{dot, load_beta, load_decay, multiply};
use crate::problem::Problem;

/// What a chunk's rows of one value head are multiplied with. The matrices' rows lie [`PITCH`] floats apart, the square
/// ones' [`MAX_CHUNK`].
pub struct Gates {
    /// What the state before the chunk is multiplied with: K and Q, decayed where every channel has a gate.
    pub k: *const f32,
    pub q: *const f32,
    /// What U is multiplied with to update the state: K, likewise.
    pub k_end: *const f32,
    /// -L and scale P, lower triangles.
    pub l: *mut f32,
    pub p: *mut f32,
    pub beta: *mut f32,
    /// beta exp(G), without what K has of it.
    pub beta_decay: *mut f32,
    /// scale exp(G), without what Q has of it.
    pub q_decay: *mut f32,
    /// exp(G_end - G), without what K has of it.
    pub to_end: *mut f32,
    /// exp(G_end), channel by channel.
    pub whole: *mut f32,
    /// Bounds for the clamp check: the largest exp(G_t - G_i), and every key's largest channel.
    pub growth: f32,
    pub k_max: *mut f32,
}

impl Gates {
    /// For `length` tokens from token `t` of the tensors on, whose keys and queries are in scratch.
    ///
    /// # Safety
    /// As for [`run`](super::chunked::run).
    #[inline(always)]
    pub unsafe fn load<S: Simd>(
        p: &Problem,
        head: usize,
        sequence: usize,
        t: usize,
        length: usize,
        scratch: *mut f32,
        at: &Scratch,
    ) -> Gates {
        // SAFETY: as in `run`; the vectors hold MAX_CHUNK floats each, a multiple of LANES.
        unsafe {
            let vector = |i: usize| scratch.add(at.vectors + i * MAX_CHUNK);
            let mut gates = Gates {
                k: scratch.add(at.k),
                q: scratch.add(at.q),
                k_end: scratch.add(at.k),
                l: scratch.add(at.l),
                p: scratch.add(at.p),
                beta: vector(2),
                beta_decay: vector(3),
                q_decay: vector(4),
                to_end: vector(5),
                whole: scratch.add(at.whole),
                growth: 1.0,
                k_max: vector(6),
            };
            for i in 0..length {
                gates.beta.add(i).write(load_beta(p, head, t + i, sequence));
                if p.state_clamp() < f32::INFINITY {
                    let row = gates.k.add(i * PITCH);
                    gates.k_max.add(i).write((0..p.head_size()).map(|c| (*row.add(c)).abs()).fold(0.0, f32::max));
                }
            }
            for i in length..length.next_multiple_of(S::LANES) {
                gates.beta.add(i).write(0.0);
            }
            if p.channel_gate() {
                let rows = [at.k_start, at.q_start, at.k_end].map(|at| scratch.add(at));
                gates.by_channel::<S>(p, [head, t, sequence], length, rows, scratch.add(at.decay));
            } else {
                let products = [at.kk, at.qk].map(|at| scratch.add(at));
                gates.shared::<S>(p, [head, t, sequence], length, [vector(0), vector(1)], products);
            }
            gates
        }
    }

    /// One gate for all channels: sums of log-decays.
    ///
    /// # Safety
    /// As for [`Gates::load`].
    #[inline(always)]
    unsafe fn shared<S: Simd>(
        &mut self,
        p: &Problem,
        [head, t, sequence]: [usize; 3],
        length: usize,
        // G is kept in f64, and in two floats for the vectors: a hard gate elsewhere in the chunk (G may reach -1e3)
        // must not cost the others' differences their last bits.
        [high, low]: [*mut f32; 2],
        [kk, qk]: [*mut f32; 2],
    ) {
        // SAFETY: passed on.
        unsafe {
            let (mut sum, mut lowest, mut rise) = (0.0f64, 0.0f64, 0.0f64);
            for i in 0..length {
                let g = f64::from(p.g.at([0, head, t + i, sequence]).cast::<f32>().read());
                let g = if g > f64::from(p.gate_max()) { f64::from(p.gate_max()) } else { g };
                // A gate of -infinity would make differences NaN; this one is as final.
                sum += if g < -1e4 { -1e4 } else { g };
                lowest = lowest.min(sum);
                rise = rise.max(sum - lowest);
                high.add(i).write(sum as f32);
                low.add(i).write((sum - f64::from(sum as f32)) as f32);
            }
            self.growth = rise.exp() as f32;
            for i in length..length.next_multiple_of(S::LANES) {
                high.add(i).write(0.0);
                low.add(i).write(0.0);
            }
            let (end_high, end_low) = (S::splat(*high.add(length - 1)), S::splat(*low.add(length - 1)));
            let scale = S::splat(p.scale());
            for i in (0..length).step_by(S::LANES) {
                let (h, l) = (S::load(high.add(i)), S::load(low.add(i)));
                let decay = S::exp(S::add(h, l));
                S::store(self.q_decay.add(i), S::mul(decay, scale));
                S::store(self.beta_decay.add(i), S::mul(decay, S::load(self.beta.add(i))));
                S::store(self.to_end.add(i), S::exp(S::add(S::sub(end_high, h), S::sub(end_low, l))));
            }
            let whole = S::splat(sum.exp() as f32);
            for channel in (0..p.head_size()).step_by(S::LANES) {
                S::store(self.whole.add(channel), whole);
            }
            for i in 0..length {
                let (h, lo) = (S::splat(*high.add(i)), S::splat(*low.add(i)));
                let beta = S::splat(-*self.beta.add(i));
                // Lanes past the diagonal may hold infinities or NaN; nobody reads them.
                for j in (0..=i).step_by(S::LANES) {
                    let cell = i * MAX_CHUNK + j;
                    let difference = S::add(S::sub(h, S::load(high.add(j))), S::sub(lo, S::load(low.add(j))));
                    let decay = S::exp(difference);
                    S::store(self.l.add(cell), S::mul(S::mul(beta, decay), S::load(kk.add(cell))));
                    S::store(self.p.add(cell), S::mul(S::mul(scale, decay), S::load(qk.add(cell))));
                }
            }
        }
    }

    /// A gate per channel: each key is decayed token by token, so that no exponent is ever positive that the gates have
    /// not made so, and ends as the update of the state needs it.
    ///
    /// # Safety
    /// As for [`Gates::load`]; each of the rows has room for a chunk's, `decay` for a head's channels.
    #[inline(always)]
    unsafe fn by_channel<S: Simd>(
        &mut self,
        p: &Problem,
        [head, t, sequence]: [usize; 3],
        length: usize,
        [k_start, q_start, k_end]: [*mut f32; 3],
        decay: *mut f32,
    ) {
        let s = p.head_size();
        // Keys that go through a visit together: two sums each for all lanes.
        let group = S::LANES.div_ceil(2);
        // SAFETY: passed on; groups divide MAX_CHUNK, and keys of a group that are not there yet are zeros.
        unsafe {
            for i in 0..length {
                self.beta_decay.add(i).write(*self.beta.add(i));
                self.q_decay.add(i).write(p.scale());
                self.to_end.add(i).write(1.0);
                load_decay::<S>(p, head, t + i, sequence, decay);
                if p.state_clamp() < f32::INFINITY {
                    self.growth *= (0..s).map(|channel| *decay.add(channel)).fold(1.0, f32::max);
                }
                let (k, q) = (self.k.add(i * PITCH), self.q.add(i * PITCH));
                let (l, pu) = (self.l.add(i * MAX_CHUNK), self.p.add(i * MAX_CHUNK));
                for channel in (0..s).step_by(S::LANES) {
                    let (old, new) = (self.whole.add(channel), S::load(decay.add(channel)));
                    S::store(old, if i == 0 { new } else { S::mul(S::load(old), new) });
                }
                multiply::<S>(self.whole, k, k_start.add(i * PITCH), s);
                multiply::<S>(self.whole, q, q_start.add(i * PITCH), s);
                for first in (0..i).step_by(group) {
                    let mut acc = [S::splat(0.0); MAX_LANES];
                    for channel in (0..s).step_by(S::LANES) {
                        let decay = S::load(decay.add(channel));
                        let (k, q) = (S::load(k.add(channel)), S::load(q.add(channel)));
                        for r in 0..group {
                            let key = k_end.add((first + r) * PITCH + channel);
                            let decayed = S::mul(decay, S::load(key));
                            S::store(key, decayed);
                            acc[r] = S::fma(decayed, k, acc[r]);
                            acc[group + r] = S::fma(decayed, q, acc[group + r]);
                        }
                    }
                    let mut sums = [0.0f32; MAX_LANES];
                    for r in (0..2 * group).step_by(S::LANES) {
                        S::sums(acc.as_ptr().add(r), sums.as_mut_ptr().add(r));
                    }
                    for r in 0..group {
                        l.add(first + r).write(-*self.beta.add(i) * sums[r]);
                        pu.add(first + r).write(p.scale() * sums[group + r]);
                    }
                }
                pu.add(i).write(p.scale() * dot::<S>(k, q, s));
                let zeros = if i % group == 0 { group } else { 1 };
                for channel in (0..s).step_by(S::LANES) {
                    S::store(k_end.add(i * PITCH + channel), S::load(k.add(channel)));
                    for r in 1..zeros {
                        S::store(k_end.add((i + r) * PITCH + channel), S::splat(0.0));
                    }
                }
            }
            (self.k, self.q, self.k_end) = (k_start, q_start, k_end);
        }
    }
}
