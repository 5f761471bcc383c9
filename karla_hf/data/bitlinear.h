/* What the kernels of the ternary linears share. A matrix W [N, K] of codes -1, 0, 1 is packed four rows to a byte, as
 * transformers does it: bits 2j and 2j + 1 of byte (r, k) hold W[j N/4 + r, k] + 1. */
#ifndef KARLA_BITLINEAR_H
#define KARLA_BITLINEAR_H
#include <math.h>
#include <stdint.h>
#include <string.h>

#define KARLA_LEAST(a, b) ((a) < (b) ? (a) : (b))
#define KARLA_INLINE static inline __attribute__((always_inline))
enum { KARLA_PORTABLE = 0, KARLA_AVX2 = 1, KARLA_AVX512 = 2 };
enum { KARLA_QUARTERS = 4, KARLA_LINE = 64, KARLA_MAX_IN = 16384, KARLA_SCRATCH = 65536, KARLA_MAX_ROWS = 64 };

/* Of a quantised row: what takes its product with codes to that of the original, the RMSNorm's factor, and the sum of
 * its values. */
typedef struct {
    float factor, norm;
    int32_t sum;
} karla_row;

/* x [in] to q [in, then zeros up to a multiple of 64]: round(x 127 / max|x|), half to even. eps < 0 leaves the RMSNorm
 * out. */
typedef karla_row karla_quantiser(const float *x, int64_t in, double eps, float floor, float scale, int8_t *q);
/* y [rows, out], float or bf16: row.factor times the integer product of q [rows, in rounded up to 64] with W [out, in]. */
typedef void karla_multiplier(const uint8_t *packed, const int8_t *q, const karla_row *row, int64_t rows, int64_t in,
                              int64_t out, void *y, int64_t bf16);

/* A layer: packed [out / 4, in], scale [1]; in is at most KARLA_MAX_IN. eps < 0: no RMSNorm. */
typedef struct {
    const uint8_t *packed;
    const float *scale;
    double eps, floor;
    int64_t in, out;
} karla_layer;

typedef void karla_widener(const uint16_t *x, int64_t in, float *y); /* bf16 to float */

typedef struct {
    karla_widener *widen;
    karla_quantiser *quantise;
    karla_multiplier *multiply;
} karla_kernels;

karla_kernels karla_now(void);
int64_t karla_level(void);
void karla_bitlinear(const karla_layer *layer, const void *x, int64_t elements, int64_t bf16, void *y);
karla_widener karla_widen, karla_widen_avx512;
karla_quantiser karla_quantise_avx2, karla_quantise_avx512;
karla_multiplier karla_multiply_avx2, karla_multiply_avx512;

KARLA_INLINE uint16_t karla_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

KARLA_INLINE void karla_put(void *y, int64_t at, float value, int64_t bf16) {
    if (bf16) ((uint16_t *)y)[at] = karla_bf16(value);
    else ((float *)y)[at] = value;
}

KARLA_INLINE int64_t karla_stride(int64_t in) { return (in + KARLA_LINE - 1) / KARLA_LINE * KARLA_LINE; }

typedef struct {
    float up, factor, norm;
} karla_scale;

/* From the sum of squares and the largest magnitude of a row. */
KARLA_INLINE karla_scale karla_scales(double square, float top, int64_t in, double eps, float floor, float scale) {
    const float up = 127.0f * (1.0f / (top > floor ? top : floor)); /* as torch takes 127 / top */
    const float norm = eps >= 0.0 ? (float)(1.0 / sqrt(square * (1.0 / (double)in) + eps)) : 1.0f;
    return (karla_scale){up, square != square ? NAN : norm / up * scale, norm}; /* a NaN in x reaches every output */
}

/* The body of a quantiser; each compiles it for its own instructions. */
KARLA_INLINE karla_row karla_quantise(const float *x, int64_t in, double eps, float floor, float scale, int8_t *q) {
    float top = 0.0f;
    double square = 0.0;
#pragma omp simd reduction(max : top) reduction(+ : square)
    for (int64_t k = 0; k < in; k++) {
        const float size = fabsf(x[k]);
        top = size > top ? size : top;
        square += (double)x[k] * x[k];
    }
    const karla_scale s = karla_scales(square, top, in, eps, floor, scale);
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < in; k++) {
        const int32_t code = (int32_t)rintf(x[k] * s.up);
        q[k] = (int8_t)code;
        sum += code;
    }
    for (int64_t k = in; k % KARLA_LINE; k++) q[k] = 0;
    return (karla_row){s.factor, s.norm, sum};
}
#endif
