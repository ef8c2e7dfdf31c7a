// The vector primitives of one instruction set. Each kernel source is compiled once per level (CMakeLists.txt), with FANIN_LEVEL
// naming it; everything else in the kernels is plain arithmetic on GCC/Clang vector types and so the same for every level.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FANIN_INLINE inline __attribute__((always_inline))

namespace fanin {
namespace FANIN_LEVEL {
namespace {  // internal linkage: the linker must never swap one level's code for another's

#if defined(FANIN_AVX512)
constexpr int W = 16;            // fp32 lanes
constexpr int ROWS_PER_TILE = 12;  // batch rows of a register tile of 2 vectors each
#elif defined(FANIN_AVX2)
constexpr int W = 8;
constexpr int ROWS_PER_TILE = 6;
#elif defined(FANIN_NEON)
constexpr int W = 4;
constexpr int ROWS_PER_TILE = 12;
#else  // scalar: no instruction set is assumed; the compiler lowers the vectors to what its target has
constexpr int W = 4;
constexpr int ROWS_PER_TILE = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

FANIN_INLINE vf broadcast(float s) { return s - vf{}; }
FANIN_INLINE vu broadcast(uint32_t s) { return s - vu{}; }
FANIN_INLINE vi broadcast(int32_t s) { return s - vi{}; }

FANIN_INLINE vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
FANIN_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// GCC 12 turns __builtin_convertvector between 16 and 32 bits into several narrow steps: hence intrinsics.
FANIN_INLINE vf load(const bf16* p) {
#if defined(FANIN_AVX512)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(FANIN_AVX2)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  vh h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}

// The upper halves of the lanes, i.e. fp32 bit patterns cut off to bf16.
FANIN_INLINE void store_upper(bf16* p, vu v) {
#if defined(FANIN_AVX512)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)v, 16)));
#elif defined(FANIN_AVX2)
  const __m256i upper = _mm256_srli_epi32((__m256i)v, 16);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1)));
#else
  const vh half = __builtin_convertvector(v >> 16, vh);
  std::memcpy(p, &half, sizeof half);
#endif
}

FANIN_INLINE vf load(const fp16* p) {
#if defined(FANIN_AVX512)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(FANIN_AVX2)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(FANIN_NEON)
  return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p)));
#else
  vf v;
  for (int i = 0; i < W; ++i) {
    const uint32_t h = p[i].bits, sign = (h & 0x8000) << 16, rest = h & 0x7FFF;
    // Scaling by 2^112 moves the exponent's bias from 15 to 127 and makes subnormals normal; infinities and NaN need all ones.
    float f;
    const uint32_t shifted = rest << 13;
    std::memcpy(&f, &shifted, 4);
    f *= 0x1p112f;
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    bits = sign | (rest >= 0x7C00 ? 0x7F800000 | shifted : bits);
    std::memcpy(&f, &bits, 4);
    v[i] = f;
  }
  return v;
#endif
}

FANIN_INLINE vf load(const int8_t* p) {
#if defined(FANIN_AVX512)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(FANIN_AVX2)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  int8_t bytes __attribute__((vector_size(W)));
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, vi), vf);
#endif
}

// base[index[0]], …, base[index[W − 1]]
FANIN_INLINE vf gather(const float* base, const uint16_t* index) {
#if defined(FANIN_AVX512)
  return (vf)_mm512_i32gather_ps(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)index)), base, 4);
#elif defined(FANIN_AVX2)  // eight loads: vgatherdps took 2.2 times as long (Zen 3)
  __m128 half[2];
  for (int i = 0; i < 2; ++i, index += 4) {
    half[i] = _mm_load_ss(base + index[0]);
    half[i] = _mm_insert_ps(half[i], _mm_load_ss(base + index[1]), 0x10);
    half[i] = _mm_insert_ps(half[i], _mm_load_ss(base + index[2]), 0x20);
    half[i] = _mm_insert_ps(half[i], _mm_load_ss(base + index[3]), 0x30);
  }
  return (vf)_mm256_set_m128(half[1], half[0]);
#else
  vf v;
  for (int i = 0; i < W; ++i) v[i] = base[index[i]];
  return v;
#endif
}

// w[0] · x[offset[0]] + w[1] · x[offset[1]], and so on, for W pairs, with offsets in bytes. x can be read one number further.
FANIN_INLINE vi gathered_pairs(const int16_t* x, const uint16_t* offset, const int8_t* w) {
  [[maybe_unused]] const auto at = [x](uint64_t bytes) { return (const int16_t*)((const char*)x + bytes); };
#if defined(FANIN_AVX512)
  const __m512i pairs = _mm512_loadu_si512(offset);
  const __m512i first = _mm512_i32gather_epi32(_mm512_and_si512(pairs, _mm512_set1_epi32(0xFFFF)), x, 1);
  const __m512i second = _mm512_i32gather_epi32(_mm512_srli_epi32(pairs, 16), x, 1);
  const __m512i both = _mm512_mask_blend_epi16(0xAAAAAAAA, first, _mm512_slli_epi32(second, 16));
  return (vi)_mm512_madd_epi16(both, _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)w)));
#elif defined(FANIN_AVX2)  // two chains of insertions for eight numbers are faster than one, offsets read by four faster than one by one
  __m128i half[2];
  for (int i = 0; i < 2; ++i, offset += 8) {
    __m128i quarter[2];
    for (int j = 0; j < 2; ++j) {
      uint64_t four;
      std::memcpy(&four, offset + 4 * j, 8);
      asm("" : "+r"(four));  // else GCC reads them one by one
      const uint32_t low = (uint32_t)four, high = (uint32_t)(four >> 32);
      quarter[j] = _mm_loadu_si32(at((uint16_t)low));
      quarter[j] = _mm_insert_epi16(quarter[j], *at(low >> 16), 1);
      quarter[j] = _mm_insert_epi16(quarter[j], *at((uint16_t)high), 2);
      quarter[j] = _mm_insert_epi16(quarter[j], *at(high >> 16), 3);
    }
    half[i] = _mm_unpacklo_epi64(quarter[0], quarter[1]);
  }
  const __m256i weights = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w));
  return (vi)_mm256_madd_epi16(_mm256_set_m128i(half[1], half[0]), weights);
#else
  vi sums;
  for (int i = 0; i < W; ++i) sums[i] = w[2 * i] * *at(offset[2 * i]) + w[2 * i + 1] * *at(offset[2 * i + 1]);
  return sums;
#endif
}

// Bit i is set where a[i] > b[i].
FANIN_INLINE uint32_t greater(vf a, vf b) {
#if defined(FANIN_AVX512)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#elif defined(FANIN_AVX2)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ));
#elif defined(FANIN_NEON)
  const uint32x4_t bit = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32((uint32x4_t)(a > b), bit));
#else
  uint32_t mask = 0;
  for (int i = 0; i < W; ++i) mask |= (uint32_t)(a[i] > b[i]) << i;
  return mask;
#endif
}

// Whether one of the n floats is greater than the limit; n is a multiple of 16.
FANIN_INLINE bool any_greater(const float* a, int n, float limit) {
#if defined(FANIN_AVX2)  // one test of all, which a mask for each vector is not
  __m256i found = _mm256_setzero_si256();
  for (int i = 0; i < n; i += W) found = _mm256_or_si256(found, (__m256i)(load(a + i) > broadcast(limit)));
  return !_mm256_testz_si256(found, found);
#else
  uint32_t found = 0;
  for (int i = 0; i < n; i += W) found |= greater(load(a + i), broadcast(limit));
  return found;
#endif
}

#if defined(FANIN_AVX2) || defined(FANIN_AVX512)
typedef int16_t vs __attribute__((vector_size(4 * W)));

FANIN_INLINE vs broadcast(int16_t s) { return s - vs{}; }
FANIN_INLINE vs load(const int16_t* p) { vs v; std::memcpy(&v, p, sizeof v); return v; }
FANIN_INLINE vu load(const uint32_t* p) { vu v; std::memcpy(&v, p, sizeof v); return v; }

// For each pair of bytes, w unsigned and x signed: w0 · x0 + w1 · x1.
FANIN_INLINE vs pair_products(vs w, vu x) {
#if defined(FANIN_AVX512)
  return (vs)_mm512_maddubs_epi16((__m512i)w, (__m512i)x);
#else
  return (vs)_mm256_maddubs_epi16((__m256i)w, (__m256i)x);
#endif
}

// For W rows each: both bytes, twice over. Adds the bytes to the sums, a lane for each, and their squares' sum to the squares.
FANIN_INLINE void store_pairs(uint32_t* out, const int8_t* first, const int8_t* second, vs& sums, vi& squares) {
#if defined(FANIN_AVX512)
  const __m128i a = _mm_loadu_si128((const __m128i*)first), b = _mm_loadu_si128((const __m128i*)second);
  const __m256i pairs = _mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b));
  const __m512i wide = _mm512_cvtepi8_epi16(pairs);
  sums += (vs)wide, squares += (vi)_mm512_madd_epi16(wide, wide);
  const vu once = (vu)_mm512_cvtepu16_epi32(pairs);
#else
  const __m128i pairs = _mm_unpacklo_epi8(_mm_loadl_epi64((const __m128i*)first), _mm_loadl_epi64((const __m128i*)second));
  const __m256i wide = _mm256_cvtepi8_epi16(pairs);
  sums += (vs)wide, squares += (vi)_mm256_madd_epi16(wide, wide);
  const vu once = (vu)_mm256_cvtepu16_epi32(pairs);
#endif
  const vu twice = once | once << 16;
  std::memcpy(out, &twice, sizeof twice);
}

// Lanes 0 + 1, 2 + 3, …
FANIN_INLINE vi sum_pairs(vs a) { return ((vi)a << 16 >> 16) + ((vi)a >> 16); }

// Whether a lane of a comparison is true.
FANIN_INLINE bool any(vs found) {
#if defined(FANIN_AVX512)
  return _mm512_test_epi32_mask((__m512i)found, (__m512i)found);
#else
  return !_mm256_testz_si256((__m256i)found, (__m256i)found);
#endif
}
#endif

#if defined(FANIN_AVX512VNNI)
// sum + the products of each lane's four bytes, w unsigned and x signed.
FANIN_INLINE vi add_quad_products(vi sum, vu w, vu x) { return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x); }

// The sixteen bytes of each: a[0], b[0], c[0], d[0], a[1], …
FANIN_INLINE vu interleaved(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
  alignas(64) static constexpr uint8_t place[64] = {
      0, 16, 32, 48, 1, 17, 33, 49, 2,  18, 34, 50, 3,  19, 35, 51, 4,  20, 36, 52, 5,  21, 37, 53, 6,  22, 38, 54, 7,  23, 39, 55,
      8, 24, 40, 56, 9, 25, 41, 57, 10, 26, 42, 58, 11, 27, 43, 59, 12, 28, 44, 60, 13, 29, 45, 61, 14, 30, 46, 62, 15, 31, 47, 63};
  const auto sixteen = [](const uint8_t* p) { return _mm_loadu_si128((const __m128i*)p); };
  __m512i all = _mm512_castsi128_si512(sixteen(a));
  all = _mm512_mask_broadcast_i32x4(all, 0x00F0, sixteen(b));
  all = _mm512_mask_broadcast_i32x4(all, 0x0F00, sixteen(c));
  all = _mm512_mask_broadcast_i32x4(all, 0xF000, sixteen(d));
  return (vu)_mm512_permutexvar_epi8(_mm512_load_si512(place), all);
}

// Sixteen numbers of 16 bits, each in 32.
FANIN_INLINE vu widened(const uint8_t* p) { return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }

FANIN_INLINE float decoded(float a) { return a; }
FANIN_INLINE float decoded(bf16 a) { const uint32_t bits = (uint32_t)a.bits << 16; float f; std::memcpy(&f, &bits, 4); return f; }
FANIN_INLINE float decoded(fp16 a) { return _cvtsh_ss(a.bits); }
FANIN_INLINE float decoded(int8_t a) { return a; }

FANIN_INLINE vu absolute_bytes(vu a) { return (vu)_mm512_abs_epi8((__m512i)a); }
FANIN_INLINE vi maximum(vi a, vi b) { return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b); }
FANIN_INLINE bool any_positive(vi a) { return _mm512_cmpgt_epi32_mask((__m512i)a, _mm512_setzero_si512()); }
#endif

FANIN_INLINE vf square_root(vf a) {
#if defined(FANIN_AVX512)
  return (vf)_mm512_sqrt_ps((__m512)a);
#elif defined(FANIN_AVX2)
  return (vf)_mm256_sqrt_ps((__m256)a);
#elif defined(FANIN_NEON)
  return (vf)vsqrtq_f32((float32x4_t)a);
#else
  for (int i = 0; i < W; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
#endif
}

// a · b + c, rounded once where the level can; the compiler fuses some and not others.
FANIN_INLINE vf multiply_add(vf a, vf b, vf c) {
#if defined(FANIN_AVX512)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(FANIN_AVX2)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(FANIN_NEON)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#elif defined(__FP_FAST_FMAF)
  for (int i = 0; i < W; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

FANIN_INLINE float sum(vf a) {
  float s = 0;
  for (int i = 0; i < W; ++i) s += a[i];
  return s;
}

// The W × W matrix of W vectors, transposed in registers: log2(W) rounds, each interleaving the two halves.
FANIN_INLINE void transpose(vf (&rows)[W]) {
  vi low, high;
  for (int i = 0; i < W; ++i) low[i] = i / 2 + (i % 2) * W, high[i] = low[i] + W / 2;
  for (int round = 1; round < W; round *= 2) {
    vf next[W];
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + W / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + W / 2], high);
    }
    for (int i = 0; i < W; ++i) rows[i] = next[i];
  }
}

FANIN_INLINE float absolute(float a) { return __builtin_fabsf(a); }
FANIN_INLINE vf absolute(vf a) { return (vf)((vu)a & 0x7FFFFFFFu); }

FANIN_INLINE vf maximum(vf a, vf b) {
#if defined(FANIN_AVX512)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(FANIN_AVX2)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// e^x for x in [−87, 0]: 2^n · e^r with |r| ≤ ln 2 / 2, e^r by its Taylor series (error below 1 ulp of fp32).
FANIN_INLINE vf exp_negative(vf x) {
  x = maximum(x, broadcast(-87.0f));
  const vf shifter = broadcast(0x1.8p23f);  // adding it rounds to an integer in the low bits
  const vf n = (x * 1.44269504f + shifter) - shifter;
  vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = r * (1.0f / 5040) + (1.0f / 720);
  p = p * r + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const vi exponent = __builtin_convertvector(n, vi) + 127;
  return p * (vf)(exponent << 23);
}

// log(1 + u) for u in [0, 1]: 2·atanh(s), s = u / (2 + u) ≤ 1/3.
FANIN_INLINE vf log1p_unit(vf u) {
  const vf s = u / (u + 2.0f), q = s * s;
  vf p = q * (1.0f / 15) + (1.0f / 13);
  p = p * q + (1.0f / 11);
  p = p * q + (1.0f / 9);
  p = p * q + (1.0f / 7);
  p = p * q + (1.0f / 5);
  p = p * q + (1.0f / 3);
  return (s + s) + (s + s) * q * p;
}

}  // namespace
}  // namespace FANIN_LEVEL
}  // namespace fanin
