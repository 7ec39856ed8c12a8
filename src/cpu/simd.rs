//! The narrow vector interface that the CPU algorithms are written against.
//!
//! An algorithm is generic over `Simd` and marked `#[inline(always)]`; a `#[target_feature]` shim instantiates it, so
//! every intrinsic below is inlined into code that has the feature.

#![allow(
    unsafe_op_in_unsafe_fn,
    clippy::undocumented_unsafe_blocks,
    clippy::missing_safety_doc,
    reason = "one intrinsic a method: the trait's one contract covers them all"
)]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Widest vector of any instance, in f32 lanes; sizes small stack buffers.
pub const MAX_LANES: usize = 16;

/// # Safety
/// Every method may be called only where the CPU has the instance's features, and pointers must be valid for LANES
/// elements (no alignment asked for).
pub trait Simd: Copy + 'static {
    type V: Copy;
    const LANES: usize;
    /// Rows of a matrix-product register tile.
    const TILE_ROWS: usize;
    /// Sums that a column's dot product is split into, so that enough of them are under way at a time.
    const CHAINS: usize;
    /// Key channels that a walk along whole rows takes at a time: their factors stay in registers.
    const KEYS: usize;
    /// Pairs of cache lines that are asked for at a time beside a matrix product.
    const PAIRS: usize;
    /// Tokens, at most, that go through a state together: twice as many sums stay in registers.
    const WINDOW: usize;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// a * b + c
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// c - a * b
    unsafe fn fnma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The second operand where either is NaN.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// Round to nearest, ties to even.
    unsafe fn round(a: Self::V) -> Self::V;
    /// 2^n for integral n in [-126, 127].
    unsafe fn exp2i(n: Self::V) -> Self::V;
    /// dst[i] = sum of the lanes of v[i], for LANES vectors.
    unsafe fn sums(v: *const Self::V, dst: *mut f32);
    /// Transposes a LANES x LANES block: dst[j * dst_stride + i] = src[i * src_stride + j].
    unsafe fn transpose(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize);
    unsafe fn load_f16(p: *const u16) -> Self::V;
    unsafe fn load_bf16(p: *const u16) -> Self::V;
    unsafe fn store_f16(p: *mut u16, v: Self::V);
    unsafe fn store_bf16(p: *mut u16, v: Self::V);
    /// Asks for the cache line at any address, valid or not.
    #[inline(always)]
    unsafe fn prefetch(p: *const f32) {
        #[cfg(target_arch = "x86_64")]
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
        #[cfg(not(target_arch = "x86_64"))]
        let _ = p;
    }
    /// The same, into L2.
    #[inline(always)]
    unsafe fn prefetch_far(p: *const f32) {
        #[cfg(target_arch = "x86_64")]
        _mm_prefetch::<_MM_HINT_T1>(p.cast());
        #[cfg(not(target_arch = "x86_64"))]
        let _ = p;
    }
    /// The same, to be written.
    #[inline(always)]
    unsafe fn prefetch_to_write(p: *const f32) {
        #[cfg(target_arch = "x86_64")]
        _mm_prefetch::<_MM_HINT_ET0>(p.cast());
        #[cfg(not(target_arch = "x86_64"))]
        let _ = p;
    }

    /// e^x, about 1 ulp; 0 below -104, infinity above 88.8, NaN for NaN.
    #[inline(always)]
    unsafe fn exp(x: Self::V) -> Self::V {
        // Operand order keeps NaN.
        let x = Self::min(Self::splat(89.0), x);
        let x = Self::max(Self::splat(-104.5), x);
        let n = Self::round(Self::mul(x, Self::splat(std::f32::consts::LOG2_E)));
        // ln 2 in two parts: n * 0.693359375 is exact.
        let r = Self::fnma(n, Self::splat(0.693_359_4), x);
        let r = Self::fnma(n, Self::splat(-2.121_944_4e-4), r);
        let mut p = Self::splat(1.987_569_1e-4);
        p = Self::fma(p, r, Self::splat(1.398_199_9e-3));
        p = Self::fma(p, r, Self::splat(8.333_452e-3));
        p = Self::fma(p, r, Self::splat(4.166_579_6e-2));
        p = Self::fma(p, r, Self::splat(1.666_666_5e-1));
        p = Self::fma(p, r, Self::splat(5e-1));
        let p = Self::add(Self::fma(Self::mul(p, r), r, r), Self::splat(1.0));
        // 2^n in two factors, so that results that are subnormal or infinite come out right.
        let half = Self::round(Self::mul(n, Self::splat(0.5)));
        Self::mul(Self::mul(p, Self::exp2i(half)), Self::exp2i(Self::sub(n, half)))
    }
}

/// One lane, no intrinsics.
#[derive(Clone, Copy)]
pub struct Scalar;

impl Simd for Scalar {
    type V = f32;
    const LANES: usize = 1;
    const TILE_ROWS: usize = 4;
    const CHAINS: usize = 1;
    const KEYS: usize = 4;
    const PAIRS: usize = 2;
    const WINDOW: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> f32 {
        x
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> f32 {
        p.read()
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: f32) {
        p.write(v)
    }
    #[inline(always)]
    unsafe fn add(a: f32, b: f32) -> f32 {
        a + b
    }
    #[inline(always)]
    unsafe fn sub(a: f32, b: f32) -> f32 {
        a - b
    }
    #[inline(always)]
    unsafe fn mul(a: f32, b: f32) -> f32 {
        a * b
    }
    #[inline(always)]
    unsafe fn fma(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
    #[inline(always)]
    unsafe fn fnma(a: f32, b: f32, c: f32) -> f32 {
        c - a * b
    }
    #[inline(always)]
    unsafe fn min(a: f32, b: f32) -> f32 {
        if a < b { a } else { b }
    }
    #[inline(always)]
    unsafe fn max(a: f32, b: f32) -> f32 {
        if a > b { a } else { b }
    }
    #[inline(always)]
    unsafe fn round(a: f32) -> f32 {
        a.round_ties_even()
    }
    #[inline(always)]
    unsafe fn exp2i(n: f32) -> f32 {
        f32::from_bits(((n as i32 + 127) as u32) << 23)
    }
    #[inline(always)]
    unsafe fn sums(v: *const f32, dst: *mut f32) {
        dst.write(v.read())
    }
    #[inline(always)]
    unsafe fn transpose(src: *const f32, _: usize, dst: *mut f32, _: usize) {
        dst.write(src.read())
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> f32 {
        half::f16::from_bits(p.read()).to_f32()
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> f32 {
        half::bf16::from_bits(p.read()).to_f32()
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, v: f32) {
        p.write(half::f16::from_f32(v).to_bits())
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, v: f32) {
        p.write(half::bf16::from_f32(v).to_bits())
    }
    // libm's is more accurate than the polynomial, and as fast here.
    #[inline(always)]
    unsafe fn exp(x: f32) -> f32 {
        x.exp()
    }
}

/// AVX2 + FMA + F16C, 8 lanes.
#[derive(Clone, Copy)]
pub struct Avx2;

impl Simd for Avx2 {
    type V = __m256;
    const LANES: usize = 8;
    const TILE_ROWS: usize = 6;
    const CHAINS: usize = 1;
    const KEYS: usize = 4;
    const PAIRS: usize = 2;
    const WINDOW: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        _mm256_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m256 {
        _mm256_loadu_ps(p)
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m256) {
        _mm256_storeu_ps(p, v)
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        _mm256_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        _mm256_sub_ps(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        _mm256_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        _mm256_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn fnma(a: __m256, b: __m256, c: __m256) -> __m256 {
        _mm256_fnmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn min(a: __m256, b: __m256) -> __m256 {
        _mm256_min_ps(a, b)
    }
    #[inline(always)]
    unsafe fn max(a: __m256, b: __m256) -> __m256 {
        _mm256_max_ps(a, b)
    }
    #[inline(always)]
    unsafe fn round(a: __m256) -> __m256 {
        _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a)
    }
    #[inline(always)]
    unsafe fn exp2i(n: __m256) -> __m256 {
        let i = _mm256_cvtps_epi32(n);
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(i, _mm256_set1_epi32(127))))
    }
    #[inline(always)]
    unsafe fn sums(v: *const __m256, dst: *mut f32) {
        // Two vectors become one: each keeps half of its lanes and adds the other half. Blends are cheaper than shuffles.
        #[inline(always)]
        unsafe fn quads(v: *const __m256) -> __m256 {
            let (a, b) = (*v, *v.add(4));
            _mm256_add_ps(_mm256_blend_ps::<0xf0>(a, b), _mm256_permute2f128_ps::<0x21>(a, b))
        }
        #[inline(always)]
        unsafe fn pairs(a: __m256, b: __m256) -> __m256 {
            let other = _mm256_shuffle_pd::<0b0101>(_mm256_castps_pd(a), _mm256_castps_pd(b));
            _mm256_add_ps(_mm256_blend_ps::<0xcc>(a, b), _mm256_castpd_ps(other))
        }
        let (even, odd) = (pairs(quads(v), quads(v.add(2))), pairs(quads(v.add(1)), quads(v.add(3))));
        let other = _mm256_permute_ps::<0b10_11_00_01>(_mm256_blend_ps::<0x55>(even, odd));
        _mm256_storeu_ps(dst, _mm256_add_ps(_mm256_blend_ps::<0xaa>(even, odd), other));
    }
    #[inline(always)]
    unsafe fn transpose(src: *const f32, ss: usize, dst: *mut f32, ds: usize) {
        // Halves are loaded crosswise, so that only in-lane shuffles remain.
        #[inline(always)]
        unsafe fn half(src: *const f32, stride: usize) -> __m256 {
            let low = _mm256_castps128_ps256(_mm_loadu_ps(src));
            _mm256_insertf128_ps::<1>(low, _mm_loadu_ps(src.add(4 * stride)))
        }
        let mut c = 0;
        while c < 8 {
            let at = src.add(c);
            let (a, b) = (half(at, ss), half(at.add(ss), ss));
            let (d, e) = (half(at.add(2 * ss), ss), half(at.add(3 * ss), ss));
            let (t0, t1) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            let (t2, t3) = (_mm256_unpacklo_ps(d, e), _mm256_unpackhi_ps(d, e));
            let r = [
                _mm256_shuffle_ps::<0x44>(t0, t2),
                _mm256_shuffle_ps::<0xee>(t0, t2),
                _mm256_shuffle_ps::<0x44>(t1, t3),
                _mm256_shuffle_ps::<0xee>(t1, t3),
            ];
            _mm256_storeu_ps(dst.add(c * ds), r[0]);
            _mm256_storeu_ps(dst.add((c + 1) * ds), r[1]);
            _mm256_storeu_ps(dst.add((c + 2) * ds), r[2]);
            _mm256_storeu_ps(dst.add((c + 3) * ds), r[3]);
            c += 4;
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m256 {
        _mm256_cvtph_ps(_mm_loadu_si128(p.cast()))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> __m256 {
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()))))
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, v: __m256) {
        _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v))
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, v: __m256) {
        let bits = _mm256_castps_si256(v);
        let top = _mm256_srli_epi32::<16>(bits);
        let odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
        let even = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        let rounded = _mm256_srli_epi32::<16>(even);
        // Rounding could carry a NaN into infinity: NaNs are cut instead, and made quiet.
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
        let quiet = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
        let r = _mm256_blendv_epi8(rounded, quiet, nan);
        let r = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(r, r));
        _mm_storeu_si128(p.cast(), _mm256_castsi256_si128(r))
    }
}

/// AVX-512, 16 lanes.
#[derive(Clone, Copy)]
pub struct Avx512;

impl Simd for Avx512 {
    type V = __m512;
    const LANES: usize = 16;
    const TILE_ROWS: usize = 12;
    const CHAINS: usize = 2;
    const KEYS: usize = 8;
    const PAIRS: usize = 4;
    const WINDOW: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        _mm512_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        _mm512_loadu_ps(p)
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        _mm512_storeu_ps(p, v)
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        _mm512_sub_ps(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn fnma(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fnmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        _mm512_min_ps(a, b)
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        _mm512_max_ps(a, b)
    }
    #[inline(always)]
    unsafe fn round(a: __m512) -> __m512 {
        _mm512_roundscale_ps::<0x08>(a)
    }
    #[inline(always)]
    unsafe fn exp2i(n: __m512) -> __m512 {
        let i = _mm512_cvtps_epi32(n);
        _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(i, _mm512_set1_epi32(127))))
    }
    #[inline(always)]
    unsafe fn sums(v: *const __m512, dst: *mut f32) {
        // As for AVX2: lanes that have the bit D of their number come from the second vector.
        #[inline(always)]
        unsafe fn fold<const D: i32, const HAS: u16>(a: __m512, b: __m512) -> __m512 {
            let lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            let other = _mm512_xor_si512(lane, _mm512_set1_epi32(D));
            let other = _mm512_mask_add_epi32(other, HAS, other, _mm512_set1_epi32(16));
            _mm512_add_ps(_mm512_mask_blend_ps(HAS, a, b), _mm512_permutex2var_ps(a, other, b))
        }
        let mut rest = [_mm512_setzero_ps(); 8];
        for i in 0..8 {
            rest[i] = fold::<8, 0xff00>(*v.add(i), *v.add(i + 8));
        }
        for i in 0..4 {
            rest[i] = fold::<4, 0xf0f0>(rest[i], rest[i + 4]);
        }
        for i in 0..2 {
            rest[i] = fold::<2, 0xcccc>(rest[i], rest[i + 2]);
        }
        _mm512_storeu_ps(dst, fold::<1, 0xaaaa>(rest[0], rest[1]));
    }
    #[inline(always)]
    unsafe fn transpose(src: *const f32, ss: usize, dst: *mut f32, ds: usize) {
        Avx2::transpose(src, ss, dst, ds);
        Avx2::transpose(src.add(8), ss, dst.add(8 * ds), ds);
        Avx2::transpose(src.add(8 * ss), ss, dst.add(8), ds);
        Avx2::transpose(src.add(8 * ss + 8), ss, dst.add(8 * ds + 8), ds);
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m512 {
        _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> __m512 {
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()))))
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, v: __m512) {
        _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v))
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, v: __m512) {
        let bits = _mm512_castps_si512(v);
        let top = _mm512_srli_epi32::<16>(bits);
        let odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
        let even = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        let rounded = _mm512_srli_epi32::<16>(even);
        // As in the AVX2 instance.
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
        let r = _mm512_mask_or_epi32(rounded, nan, top, _mm512_set1_epi32(0x40));
        _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(r))
    }
}
