/* The kernels of bitlinear.c for AVX2 and for AVX512-VNNI, compiled into every build for x86-64. */
#include "bitlinear.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
enum { TILE = 16, FEW_ROWS = 3 };

AVX2 karla_row karla_quantise_avx2(const float *x, int64_t in, double eps, float floor, float scale, int8_t *q) {
    return karla_quantise(x, in, eps, floor, scale, q);
}

AVX512 void karla_widen_avx512(const uint16_t *x, int64_t in, float *y) {
    int64_t k = 0;
    for (; k + 16 <= in; k += 16) {
        const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(x + k))), 16);
        _mm512_storeu_si512(y + k, bits);
    }
    karla_widen(x + k, in - k, y + k);
}

/* As karla_quantise, with sums that do not wait for each other. */
AVX512 karla_row karla_quantise_avx512(const float *x, int64_t in, double eps, float floor, float scale, int8_t *q) {
    __m512d square[4] = {_mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd()};
    __m512 top[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t k = 0; k < in; k += 32)
        for (int i = 0; i < 2; i++) {
            const int64_t left = in - k - 16 * i;
            const __mmask16 kept = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
            const __m512 v = _mm512_maskz_loadu_ps(kept, x + k + 16 * i);
            const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
            const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
            square[2 * i] = _mm512_fmadd_pd(low, low, square[2 * i]);
            square[2 * i + 1] = _mm512_fmadd_pd(high, high, square[2 * i + 1]);
            top[i] = _mm512_max_ps(top[i], _mm512_abs_ps(v));
        }
    const double total = _mm512_reduce_add_pd(
        _mm512_add_pd(_mm512_add_pd(square[0], square[1]), _mm512_add_pd(square[2], square[3])));
    const karla_scale s = karla_scales(total, _mm512_reduce_max_ps(_mm512_max_ps(top[0], top[1])), in, eps, floor, scale);
    const __m512 up = _mm512_set1_ps(s.up);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < in; k += 16) {
        const __mmask16 kept = in - k >= 16 ? 0xffff : (__mmask16)((1u << (in - k)) - 1);
        const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(kept, x + k), up));
        _mm_storeu_si128((void *)(q + k), _mm512_cvtepi32_epi8(code));
        sum = _mm512_add_epi32(sum, code);
    }
    for (int64_t k = (in + 15) / 16 * 16; k % KARLA_LINE; k += 16) _mm_storeu_si128((void *)(q + k), _mm_setzero_si128());
    return (karla_row){s.factor, s.norm, _mm512_reduce_add_epi32(sum)};
}

/* ---- AVX2: two rows of x at a time ---- */

AVX2 KARLA_INLINE int32_t sum_of_lanes(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

/* Products of two columns fit 16 bits, and so does the sum of 32 such: 32 * 2 * 2 * 127 < 2^15. */
AVX2 KARLA_INLINE void dots(const uint8_t *packed, const int8_t *q, int64_t stride, int64_t in, int rows,
                            int32_t sums[2][KARLA_QUARTERS]) {
    enum { STEP = 32, SAFE = 32 * STEP };
    const __m256i two_bits = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1), zero = _mm256_setzero_si256();
    __m256i total[2][KARLA_QUARTERS] = {{zero, zero, zero, zero}, {zero, zero, zero, zero}};
    for (int64_t begin = 0; begin < in; begin += SAFE) {
        __m256i part[2][KARLA_QUARTERS] = {{zero, zero, zero, zero}, {zero, zero, zero, zero}};
        for (int64_t k = begin; k < KARLA_LEAST(begin + SAFE, in); k += STEP) {
            uint8_t rest[STEP] = {0};
            if (in - k < STEP) memcpy(rest, packed + k, (size_t)(in - k));
            const __m256i bytes = _mm256_loadu_si256((const void *)(in - k < STEP ? rest : packed + k));
            const __m256i code[KARLA_QUARTERS] = {
                _mm256_and_si256(bytes, two_bits), _mm256_and_si256(_mm256_srli_epi16(bytes, 2), two_bits),
                _mm256_and_si256(_mm256_srli_epi16(bytes, 4), two_bits),
                _mm256_and_si256(_mm256_srli_epi16(bytes, 6), two_bits)};
            for (int m = 0; m < rows; m++) {
                const __m256i value = _mm256_loadu_si256((const void *)(q + m * stride + k));
                for (int j = 0; j < KARLA_QUARTERS; j++)
                    part[m][j] = _mm256_add_epi16(part[m][j], _mm256_maddubs_epi16(code[j], value));
            }
        }
        for (int m = 0; m < rows; m++)
            for (int j = 0; j < KARLA_QUARTERS; j++)
                total[m][j] = _mm256_add_epi32(total[m][j], _mm256_madd_epi16(part[m][j], ones));
    }
    for (int m = 0; m < rows; m++)
        for (int j = 0; j < KARLA_QUARTERS; j++) sums[m][j] = sum_of_lanes(total[m][j]);
}

AVX2 void karla_multiply_avx2(const uint8_t *packed, const int8_t *q, const karla_row *row, int64_t rows, int64_t in,
                              int64_t out, void *y, int64_t bf16) {
    const int64_t quarter = out / KARLA_QUARTERS, stride = karla_stride(in);
    for (int64_t r = 0; r < quarter; r++, packed += in)
        for (int64_t m = 0; m < rows; m += 2) {
            int32_t sums[2][KARLA_QUARTERS];
            const int count = (int)KARLA_LEAST(rows - m, 2);
            if (count == 2) dots(packed, q + m * stride, stride, in, 2, sums);
            else dots(packed, q + m * stride, stride, in, 1, sums);
            for (int i = 0; i < count; i++)
                for (int j = 0; j < KARLA_QUARTERS; j++)
                    karla_put(y, (m + i) * out + j * quarter + r, (float)(sums[i][j] - row[m + i].sum) * row[m + i].factor,
                              bf16);
        }
}

/* ---- AVX512: vpdpbusd multiplies unsigned by signed bytes. Codes stay where they lie in their byte, which multiplies
 * the sum of quarter j by 4^j until it is shifted back. ---- */

/* As _mm512_dpbusd_epi32, but gcc 12 then keeps sixteen sums in registers. */
AVX512 KARLA_INLINE __m512i add_dots(__m512i sum, __m512i code, __m512i value) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(code), "v"(value));
    return sum;
}

AVX512 KARLA_INLINE __m256i narrow(__m512 v) {
    const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

AVX512 KARLA_INLINE __m512 finish(__m512i sum, karla_row row) {
    const __m512i exact = _mm512_sub_epi32(sum, _mm512_set1_epi32(row.sum));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(row.factor));
}

/* The sum of each of 16 vectors, in their order. */
AVX512 KARLA_INLINE __m512i sums_of(const __m512i v[16]) {
    __m512i a[8], b[4], c[2];
#define PAIRS(to, count, from, first, second)  \
    for (int i = 0; i < count; i++) to[i] = _mm512_add_epi32(first(from[2 * i], from[2 * i + 1]), second(from[2 * i], from[2 * i + 1]))
#define EVEN(x, y) _mm512_shuffle_i32x4(x, y, 0x88)
#define ODD(x, y) _mm512_shuffle_i32x4(x, y, 0xdd)
    PAIRS(a, 8, v, _mm512_unpacklo_epi32, _mm512_unpackhi_epi32);
    PAIRS(b, 4, a, _mm512_unpacklo_epi64, _mm512_unpackhi_epi64);
    PAIRS(c, 2, b, EVEN, ODD);
    return _mm512_add_epi32(EVEN(c[0], c[1]), ODD(c[0], c[1]));
#undef PAIRS
}

/* sum[4 j + i] += the products of 64 columns of packed row i, quarter j. */
AVX512 KARLA_INLINE void add_columns(__m512i sum[16], const __m512i code[4], __m512i value) {
    for (int i = 0; i < 4; i++) {
        sum[i] = add_dots(sum[i], _mm512_and_si512(code[i], _mm512_set1_epi8(0x03)), value);
        sum[4 + i] = add_dots(sum[4 + i], _mm512_and_si512(code[i], _mm512_set1_epi8(0x0c)), value);
        sum[8 + i] = add_dots(sum[8 + i], _mm512_and_si512(code[i], _mm512_set1_epi8(0x30)), value);
        sum[12 + i] = add_dots(sum[12 + i], _mm512_and_si512(code[i], _mm512_set1_epi8((char)0xc0)), value);
    }
}

/* One row of x: four packed rows, sixteen weights a column, at a time. */
AVX512 static void multiply_row(const uint8_t *packed, const int8_t *q, karla_row row, int64_t in, int64_t out, void *y,
                                int64_t bf16) {
    const int64_t quarter = out / KARLA_QUARTERS, whole = in / KARLA_LINE * KARLA_LINE;
    const __m512i shift = _mm512_set_epi32(6, 6, 6, 6, 4, 4, 4, 4, 2, 2, 2, 2, 0, 0, 0, 0);
    const __mmask64 rest = ((__mmask64)1 << (in - whole)) - 1;
    for (int64_t r = 0; r < quarter; r += 4) {
        const int64_t left = KARLA_LEAST(quarter - r, 4);
        const uint8_t *from[4];
        __m512i sum[16], code[4];
        for (int i = 0; i < 4; i++) from[i] = packed + (r + KARLA_LEAST(i, left - 1)) * in;
        for (int i = 0; i < 16; i++) sum[i] = _mm512_setzero_si512();
        for (int64_t k = 0; k < whole; k += KARLA_LINE) {
            for (int i = 0; i < 4; i++) code[i] = _mm512_loadu_si512(from[i] + k);
            add_columns(sum, code, _mm512_loadu_si512(q + k));
        }
        if (rest) {
            for (int i = 0; i < 4; i++) code[i] = _mm512_maskz_loadu_epi8(rest, from[i] + whole);
            add_columns(sum, code, _mm512_loadu_si512(q + whole));
        }
        const __m512 result = finish(_mm512_srav_epi32(sums_of(sum), shift), row);
        const __mmask8 kept = (__mmask8)((1 << left) - 1);
        if (bf16) {
            uint64_t parts[4];
            _mm256_storeu_si256((void *)parts, narrow(result));
            for (int j = 0; j < 4; j++) memcpy((uint16_t *)y + j * quarter + r, parts + j, (size_t)left * 2);
        } else {
            float *to = (float *)y + r;
            _mm_mask_storeu_ps(to, kept, _mm512_castps512_ps128(result));
            _mm_mask_storeu_ps(to + quarter, kept, _mm512_extractf32x4_ps(result, 1));
            _mm_mask_storeu_ps(to + 2 * quarter, kept, _mm512_extractf32x4_ps(result, 2));
            _mm_mask_storeu_ps(to + 3 * quarter, kept, _mm512_extractf32x4_ps(result, 3));
        }
    }
}

/* tile [in / 4 rounded up, 16] words: word (g, o) holds the bytes of columns 4 g .. 4 g + 3 of packed row o. */
AVX512 static void make_tile(const uint8_t *packed, int64_t rows, int64_t in, uint32_t *tile) {
    __m512i a[TILE], b[TILE];
    for (int64_t k = 0; k < in; k += KARLA_LINE, tile += TILE * TILE) {
        const __mmask64 kept = in - k >= KARLA_LINE ? ~(__mmask64)0 : ((__mmask64)1 << (in - k)) - 1;
        for (int o = 0; o < TILE; o++) a[o] = _mm512_maskz_loadu_epi8(o < rows ? kept : 0, packed + o * in + k);
        for (int o = 0; o < TILE; o += 2)
            b[o] = _mm512_unpacklo_epi32(a[o], a[o + 1]), b[o + 1] = _mm512_unpackhi_epi32(a[o], a[o + 1]);
        for (int o = 0; o < TILE; o += 4)
            for (int i = 0; i < 2; i++) {
                a[o + 2 * i] = _mm512_unpacklo_epi64(b[o + i], b[o + i + 2]);
                a[o + 2 * i + 1] = _mm512_unpackhi_epi64(b[o + i], b[o + i + 2]);
            }
        for (int i = 0; i < 4; i++) { /* a[o + i] holds words i, 4 + i, 8 + i and 12 + i of rows o .. o + 3 */
            const __m512i even_low = EVEN(a[i], a[4 + i]), odd_low = ODD(a[i], a[4 + i]);
            const __m512i even_high = EVEN(a[8 + i], a[12 + i]), odd_high = ODD(a[8 + i], a[12 + i]);
            _mm512_storeu_si512(tile + TILE * i, EVEN(even_low, even_high));
            _mm512_storeu_si512(tile + TILE * (4 + i), EVEN(odd_low, odd_high));
            _mm512_storeu_si512(tile + TILE * (8 + i), ODD(even_low, even_high));
            _mm512_storeu_si512(tile + TILE * (12 + i), ODD(odd_low, odd_high));
        }
    }
}

/* sum[m][j] for four rows m of q. */
AVX512 KARLA_INLINE void multiply_tile(const uint32_t *tile, const int8_t *q, int64_t stride, int64_t groups,
                                       __m512i sum[4][KARLA_QUARTERS]) {
    for (int m = 0; m < 4; m++)
        for (int j = 0; j < KARLA_QUARTERS; j++) sum[m][j] = _mm512_setzero_si512();
    for (int64_t g = 0; g < groups; g++) {
        const __m512i bytes = _mm512_loadu_si512(tile + g * TILE);
        const __m512i code[KARLA_QUARTERS] = {
            _mm512_and_si512(bytes, _mm512_set1_epi8(0x03)), _mm512_and_si512(bytes, _mm512_set1_epi8(0x0c)),
            _mm512_and_si512(bytes, _mm512_set1_epi8(0x30)), _mm512_and_si512(bytes, _mm512_set1_epi8((char)0xc0))};
        for (int m = 0; m < 4; m++) {
            int32_t four;
            memcpy(&four, q + m * stride + 4 * g, 4);
            for (int j = 0; j < KARLA_QUARTERS; j++)
                sum[m][j] = add_dots(sum[m][j], code[j], _mm512_set1_epi32(four));
        }
    }
}

AVX512 void karla_multiply_avx512(const uint8_t *packed, const int8_t *q, const karla_row *row, int64_t rows, int64_t in,
                                  int64_t out, void *y, int64_t bf16) {
    const int64_t quarter = out / KARLA_QUARTERS, stride = karla_stride(in);
    if (rows <= FEW_ROWS) {
        for (int64_t m = 0; m < rows; m++)
            multiply_row(packed, q + m * stride, row[m], in, out, (char *)y + m * out * (bf16 ? 2 : 4), bf16);
        return;
    }
    uint32_t tile[KARLA_MAX_IN / 4 * TILE];
    for (int64_t r = 0; r < quarter; r += TILE, packed += TILE * in) {
        const int64_t width = KARLA_LEAST(quarter - r, TILE);
        const __mmask16 kept = (__mmask16)((1u << width) - 1);
        make_tile(packed, width, in, tile);
        for (int64_t m = 0; m < rows; m += 4) {
            const int64_t first = KARLA_LEAST(m, rows - 4); /* the last four rows may overlap the four before */
            __m512i sum[4][KARLA_QUARTERS];
            multiply_tile(tile, q + first * stride, stride, (in + 3) / 4, sum);
            for (int64_t i = 0; i < 4; i++)
                for (int j = 0; j < KARLA_QUARTERS; j++) {
                    const int64_t at = (first + i) * out + j * quarter + r;
                    const __m512 result = finish(_mm512_srai_epi32(sum[i][j], 2 * j), row[first + i]);
                    if (bf16) _mm256_mask_storeu_epi16((uint16_t *)y + at, kept, narrow(result));
                    else _mm512_mask_storeu_ps((float *)y + at, kept, result);
                }
        }
    }
}
#endif
