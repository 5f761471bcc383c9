/* y = RMSNorm(x) quantised to int8, times ternary weights, scaled: one call for the few rows of decoding.
 * x [rows, in] float, w [out, in] in {-1, 0, 1}, scale [1] float, y [rows, out] float; in is at most 65536.
 * eps < 0 leaves the norm out. The integer product is exact, rounding is half to even, and the mean square is taken in
 * double as in the torch path, so both give the same floats. */
#include <math.h>
#include <stdint.h>

#ifdef __AVX512VNNI__
#include <immintrin.h>

/* vpdpbusd multiplies unsigned by signed bytes, so it sums (w + 1) q, and sum(q) is taken off again. */
static int32_t dot(const int8_t *w, const int8_t *q, int32_t sum_q, int64_t in) {
    const __m512i one = _mm512_set1_epi8(1);
    __m512i first = _mm512_setzero_si512(), second = first;
    int64_t k = 0;
    for (; k + 128 <= in; k += 128) {
        first = _mm512_dpbusd_epi32(first, _mm512_add_epi8(_mm512_loadu_si512(w + k), one), _mm512_loadu_si512(q + k));
        second = _mm512_dpbusd_epi32(second, _mm512_add_epi8(_mm512_loadu_si512(w + k + 64), one),
                                     _mm512_loadu_si512(q + k + 64));
    }
    for (; k < in; k += 64) {
        __mmask64 rest = in - k >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << (in - k)) - 1;
        first = _mm512_dpbusd_epi32(first, _mm512_add_epi8(_mm512_maskz_loadu_epi8(rest, w + k), one),
                                    _mm512_maskz_loadu_epi8(rest, q + k));
    }
    return _mm512_reduce_add_epi32(_mm512_add_epi32(first, second)) - sum_q;
}
#else
static int32_t dot(const int8_t *w, const int8_t *q, int32_t sum_q, int64_t in) {
    int32_t sum = 0;
    (void)sum_q;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < in; k++) sum += (int16_t)w[k] * (int16_t)q[k];
    return sum;
}
#endif

void karla_bitlinear(const float *x, const int8_t *w, const float *scale, double eps, float min_absmax, int64_t rows,
                     int64_t in, int64_t out, float *y) {
    int8_t quantised[in];
    for (int64_t r = 0; r < rows; r++, x += in, y += out) {
        float top = 0.0f;
        double square = 0.0;
#pragma omp simd reduction(max : top) reduction(+ : square)
        for (int64_t k = 0; k < in; k++) {
            float size = fabsf(x[k]);
            top = size > top ? size : top;
            square += (double)x[k] * x[k];
        }
        top = top > min_absmax ? top : min_absmax;
        float up = 127.0f * (1.0f / top);
        float factor = (eps >= 0.0 ? (float)(1.0 / sqrt(square * (1.0 / (double)in) + eps)) : 1.0f) / up * *scale;
        if (square != square) factor = NAN; /* a NaN in x reaches every output */
        int32_t sum_q = 0;
        for (int64_t k = 0; k < in; k++) {
            quantised[k] = (int8_t)rintf(x[k] * up);
            sum_q += quantised[k];
        }
        for (int64_t n = 0; n < out; n++) y[n] = (float)dot(w + n * in, quantised, sum_q, in) * factor;
    }
}
