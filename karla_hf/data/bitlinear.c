/* y = RMSNorm(x) quantised to int8, times ternary weights of two bits, scaled. The integer product is exact, rounding is
 * half to even, and the mean square is taken in double as in the torch path, so both give the same floats. What the
 * processor can do is looked up at run time: AVX512-VNNI, AVX2, or plain C. Nothing is allocated. */
#include "bitlinear.h"

static int64_t limit = KARLA_AVX512;

/* For tests: use nothing better than `level`. */
void karla_limit_level(int64_t level) { limit = level; }

/* The best level of this processor, within the limit. */
int64_t karla_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const int wide = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const int64_t best = wide ? KARLA_AVX512 : __builtin_cpu_supports("avx2") ? KARLA_AVX2 : KARLA_PORTABLE;
    return KARLA_LEAST(best, limit);
#else
    return KARLA_PORTABLE;
#endif
}

void karla_widen(const uint16_t *x, int64_t in, float *y) {
    for (int64_t k = 0; k < in; k++) {
        const uint32_t bits = (uint32_t)x[k] << 16;
        memcpy(y + k, &bits, 4);
    }
}

static karla_row quantise(const float *x, int64_t in, double eps, float floor, float scale, int8_t *q) {
    return karla_quantise(x, in, eps, floor, scale, q);
}

static void multiply(const uint8_t *packed, const int8_t *q, const karla_row *row, int64_t rows, int64_t in, int64_t out,
                     void *y, int64_t bf16) {
    const int64_t quarter = out / KARLA_QUARTERS, stride = karla_stride(in);
    for (int64_t r = 0; r < quarter; r++, packed += in)
        for (int64_t m = 0; m < rows; m++) {
            const int8_t *values = q + m * stride;
            int32_t a = -row[m].sum, b = a, c = a, d = a;
#pragma omp simd reduction(+ : a, b, c, d)
            for (int64_t k = 0; k < in; k++) {
                const int16_t code = packed[k], value = values[k];
                a += (int16_t)((code & 3) * value);
                b += (int16_t)((code >> 2 & 3) * value);
                c += (int16_t)((code >> 4 & 3) * value);
                d += (int16_t)((code >> 6) * value);
            }
            const int32_t sums[KARLA_QUARTERS] = {a, b, c, d};
            for (int j = 0; j < KARLA_QUARTERS; j++)
                karla_put(y, m * out + j * quarter + r, (float)sums[j] * row[m].factor, bf16);
        }
}

karla_kernels karla_now(void) {
#if defined(__x86_64__)
    const int64_t level = karla_level();
    if (level == KARLA_AVX512) return (karla_kernels){karla_widen_avx512, karla_quantise_avx512, karla_multiply_avx512};
    if (level == KARLA_AVX2) return (karla_kernels){karla_widen, karla_quantise_avx2, karla_multiply_avx2};
#endif
    return (karla_kernels){karla_widen, quantise, multiply};
}

/* x [rows, in], `elements` in all, and y [rows, out], both float or both bf16. */
void karla_bitlinear(const karla_layer *layer, const void *x, int64_t elements, int64_t bf16, void *y) {
    const karla_kernels kernels = karla_now();
    const int64_t in = layer->in, out = layer->out, rows = elements / in, stride = karla_stride(in);
    const int64_t most = KARLA_LEAST(KARLA_SCRATCH / stride, KARLA_MAX_ROWS);
    int8_t q[KARLA_SCRATCH];
    karla_row row[KARLA_MAX_ROWS];
    float wide[KARLA_MAX_IN];
    for (int64_t begin = 0; begin < rows; begin += most) {
        const int64_t count = KARLA_LEAST(rows - begin, most);
        for (int64_t m = 0; m < count; m++) {
            const float *values = (const float *)x + (begin + m) * in;
            if (bf16) {
                kernels.widen((const uint16_t *)x + (begin + m) * in, in, wide);
                values = wide;
            }
            row[m] = kernels.quantise(values, in, layer->eps, (float)layer->floor, *layer->scale, q + m * stride);
        }
        kernels.multiply(layer->packed, q, row, count, in, out, (char *)y + begin * out * (bf16 ? 2 : 4), bf16);
    }
}

/* x [rows, in] to q [rows, in], and for every row 1 / s_x and the RMSNorm's factor: what a training step keeps. */
void karla_quantise_rows(const float *x, double eps, double floor, int64_t rows, int64_t in, int8_t *q, float *inverse,
                         float *norm) {
    const karla_kernels kernels = karla_now();
    int8_t scratch[KARLA_SCRATCH];
    for (int64_t m = 0; m < rows; m++) {
        int8_t *to = in % KARLA_LINE ? scratch : q + m * in;
        const karla_row row = kernels.quantise(x + m * in, in, eps, (float)floor, 1.0f, to);
        if (to == scratch) memcpy(q + m * in, scratch, (size_t)in);
        inverse[m] = row.factor, norm[m] = row.norm;
    }
}
