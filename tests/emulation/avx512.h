// The AVX-512 intrinsics that the kernels use, made of AVX2's for each half: for machines without AVX-512, see avx512.sh.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace emulated {

template <class Half, class Whole>
Half half_of(const Whole& whole, int i) {
  Half half;
  std::memcpy(&half, (const char*)&whole + i * sizeof half, sizeof half);
  return half;
}

// `each` of halves 0 and 1, side by side.
template <class Whole, class Each>
Whole halves(Each each) {
  const auto low = each(0), high = each(1);
  Whole whole;
  static_assert(2 * sizeof low == sizeof whole);
  std::memcpy(&whole, &low, sizeof low), std::memcpy((char*)&whole + sizeof low, &high, sizeof high);
  return whole;
}

}  // namespace emulated

#define FANIN_I(whole, i) emulated::half_of<__m256i>(whole, i)
#define FANIN_F(whole, i) emulated::half_of<__m256>(whole, i)
#define FANIN_H(whole, i) emulated::half_of<__m128i>(whole, i)
#define FANIN_INTS(expression) emulated::halves<__m512i>([&](int i) { return expression; })
#define FANIN_FLOATS(expression) emulated::halves<__m512>([&](int i) { return expression; })

inline __m512i fanin_loadu(const void* p) { return FANIN_INTS(_mm256_loadu_si256((const __m256i*)p + i)); }
inline __m512i fanin_set1(int a) { return FANIN_INTS((void(i), _mm256_set1_epi32(a))); }
inline __m512i fanin_and(__m512i a, __m512i b) { return FANIN_INTS(_mm256_and_si256(FANIN_I(a, i), FANIN_I(b, i))); }
inline __m512i fanin_slli(__m512i a, unsigned n) { return FANIN_INTS(_mm256_slli_epi32(FANIN_I(a, i), (int)n)); }
inline __m512i fanin_srli(__m512i a, unsigned n) { return FANIN_INTS(_mm256_srli_epi32(FANIN_I(a, i), (int)n)); }
inline __m512i fanin_madd(__m512i a, __m512i b) { return FANIN_INTS(_mm256_madd_epi16(FANIN_I(a, i), FANIN_I(b, i))); }
inline __m512i fanin_maddubs(__m512i a, __m512i b) { return FANIN_INTS(_mm256_maddubs_epi16(FANIN_I(a, i), FANIN_I(b, i))); }
inline __m512 fanin_max(__m512 a, __m512 b) { return FANIN_FLOATS(_mm256_max_ps(FANIN_F(a, i), FANIN_F(b, i))); }
inline __m512 fanin_fmadd(__m512 a, __m512 b, __m512 c) {
  return FANIN_FLOATS(_mm256_fmadd_ps(FANIN_F(a, i), FANIN_F(b, i), FANIN_F(c, i)));
}
inline __m512 fanin_sqrt(__m512 a) { return FANIN_FLOATS(_mm256_sqrt_ps(FANIN_F(a, i))); }
inline __m512i fanin_cvtepi8_epi16(__m256i a) { return FANIN_INTS(_mm256_cvtepi8_epi16(FANIN_H(a, i))); }
inline __m512i fanin_cvtepu16_epi32(__m256i a) { return FANIN_INTS(_mm256_cvtepu16_epi32(FANIN_H(a, i))); }
inline __m512i fanin_cvtepi8_epi32(__m128i a) { return FANIN_INTS(_mm256_cvtepi8_epi32(i ? _mm_srli_si128(a, 8) : a)); }
inline __m512 fanin_cvtepi32_ps(__m512i a) { return FANIN_FLOATS(_mm256_cvtepi32_ps(FANIN_I(a, i))); }
inline __m512 fanin_cvtph_ps(__m256i a) { return FANIN_FLOATS(_mm256_cvtph_ps(FANIN_H(a, i))); }
inline __m512i fanin_gather(__m512i index, const void* base, int scale) {
  return FANIN_INTS(scale == 1 ? _mm256_i32gather_epi32((const int*)base, FANIN_I(index, i), 1)
                               : _mm256_i32gather_epi32((const int*)base, FANIN_I(index, i), 4));
}
inline __m256i fanin_cvtepi32_epi16(__m512i a) {  // the low 16 bits of each lane
  return emulated::halves<__m256i>([&](int i) {
    const __m256i low = _mm256_and_si256(FANIN_I(a, i), _mm256_set1_epi32(0xFFFF));
    return _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  });
}
inline __m512i fanin_blend(uint32_t mask, __m512i a, __m512i b) {  // 16-bit lanes of b where the mask's bits are set
  uint16_t lanes[32], other[32];
  std::memcpy(lanes, &a, 64), std::memcpy(other, &b, 64);
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) lanes[i] = other[i];
  return fanin_loadu(lanes);
}
template <int how>
uint32_t fanin_compare(__m512 a, __m512 b) {
  const auto of = [&](int i) { return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(FANIN_F(a, i), FANIN_F(b, i), how)); };
  return of(0) | of(1) << 8;
}
inline uint32_t fanin_test(__m512i a, __m512i b) {
  const __m512i both = fanin_and(a, b);
  const auto zero = [&](int i) {
    return (uint32_t)_mm256_movemask_ps((__m256)_mm256_cmpeq_epi32(FANIN_I(both, i), _mm256_setzero_si256()));
  };
  return ~(zero(0) | zero(1) << 8) & 0xFFFF;
}

// Of level avx512vnni.
inline __m512i fanin_dpbusd(__m512i sum, __m512i a, __m512i b) {  // a unsigned, b signed
  uint8_t u[64];
  int8_t v[64];
  int32_t sums[16];
  std::memcpy(u, &a, 64), std::memcpy(v, &b, 64), std::memcpy(sums, &sum, 64);
  for (int i = 0; i < 64; ++i) sums[i / 4] += u[i] * v[i];
  return fanin_loadu(sums);
}
inline __m512i fanin_permute(__m512i places, __m512i a) {
  uint8_t from[64], to[64];
  std::memcpy(from, &a, 64), std::memcpy(to, &places, 64);
  for (auto& byte : to) byte = from[byte % 64];
  return fanin_loadu(to);
}
inline __m512i fanin_broadcast(__m512i a, uint32_t mask, __m128i b) {  // 32-bit lanes of b, over and over, where the mask's bits are set
  int32_t lanes[16], other[4];
  std::memcpy(lanes, &a, 64), std::memcpy(other, &b, 16);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) lanes[i] = other[i % 4];
  return fanin_loadu(lanes);
}
inline __m512i fanin_widen(__m128i a) { return fanin_broadcast(fanin_set1(0), 0xF, a); }
inline __m512i fanin_abs(__m512i a) { return FANIN_INTS(_mm256_abs_epi8(FANIN_I(a, i))); }
inline __m512i fanin_max_epi32(__m512i a, __m512i b) { return FANIN_INTS(_mm256_max_epi32(FANIN_I(a, i), FANIN_I(b, i))); }
inline uint32_t fanin_greater(__m512i a, __m512i b) {
  const auto of = [&](int i) { return (uint32_t)_mm256_movemask_ps((__m256)_mm256_cmpgt_epi32(FANIN_I(a, i), FANIN_I(b, i))); };
  return of(0) | of(1) << 8;
}

#define _mm512_dpbusd_epi32 fanin_dpbusd
#define _mm512_permutexvar_epi8 fanin_permute
#define _mm512_mask_broadcast_i32x4 fanin_broadcast
#define _mm512_castsi128_si512 fanin_widen
#define _mm512_load_si512 fanin_loadu
#define _mm512_abs_epi8 fanin_abs
#define _mm512_max_epi32 fanin_max_epi32
#define _mm512_cmpgt_epi32_mask fanin_greater
#define _mm512_setzero_si512() fanin_set1(0)

#define _mm512_loadu_si512 fanin_loadu
#define _mm512_set1_epi32 fanin_set1
#define _mm512_and_si512 fanin_and
#define _mm512_slli_epi32 fanin_slli
#define _mm512_srli_epi32 fanin_srli
#define _mm512_madd_epi16 fanin_madd
#define _mm512_maddubs_epi16 fanin_maddubs
#define _mm512_max_ps fanin_max
#define _mm512_fmadd_ps fanin_fmadd
#define _mm512_sqrt_ps fanin_sqrt
#define _mm512_cvtepi8_epi16 fanin_cvtepi8_epi16
#define _mm512_cvtepu16_epi32 fanin_cvtepu16_epi32
#define _mm512_cvtepi8_epi32 fanin_cvtepi8_epi32
#define _mm512_cvtepi32_ps fanin_cvtepi32_ps
#define _mm512_cvtph_ps fanin_cvtph_ps
#undef _mm512_i32gather_epi32
#define _mm512_i32gather_epi32 fanin_gather
#undef _mm512_i32gather_ps
#define _mm512_i32gather_ps(index, base, scale) (__m512) fanin_gather(index, base, scale)
#define _mm512_cvtepi32_epi16 fanin_cvtepi32_epi16
#define _mm512_mask_blend_epi16 fanin_blend
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, how) fanin_compare<how>(a, b)
#define _mm512_test_epi32_mask fanin_test
