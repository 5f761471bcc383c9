/* Turns of the residual stream of decoding: one position of every sequence, all ticks in one call. A turn is
 *
 *     r <- r + W_o attention(W_r r),   r <- r + w,  w = W_2 silu(W_1 r),   writes <- writes + w
 *
 * as head_karla.KarlaHead does it in torch, up to rounding. */
#include "bitlinear.h"

/* The four layers of the stream and its sizes: heads H, their width d (even), keys L of a sequence. */
typedef struct {
    const karla_layer *query, *out, *in, *write;
    int64_t heads, width, keys;
} karla_stream;

/* exp(x) for x <= 0, relative error below 2e-7: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. */
KARLA_INLINE float exp_of(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float n = rintf(x * 1.44269504f), r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const float p = 1.0f + r * (1.0f + r * (0.5f + r * (0.166666667f + r * (4.16666667e-2f + r * (8.33333333e-3f + r * 1.38888889e-3f)))));
    const int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

/* seen [d] = softmax(q keys^T / sqrt(d) + mask) values of one head; scores [L] is scratch. */
KARLA_INLINE void attend(const float *q, const float *keys, const float *values, const float *mask, int64_t count,
                         int64_t width, float *scores, float *seen) {
    const float scale = 1.0f / sqrtf((float)width);
    const int64_t whole = count / 4 * 4; /* four keys at a time, so that their sums do not wait for each other */
    float top = -INFINITY, total = 0.0f;
    for (int64_t l = 0; l < whole; l += 4) {
        const float *k = keys + l * width;
        float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
#pragma omp simd reduction(+ : a, b, c, d)
        for (int64_t i = 0; i < width; i++)
            a += q[i] * k[i], b += q[i] * k[width + i], c += q[i] * k[2 * width + i], d += q[i] * k[3 * width + i];
        scores[l] = a, scores[l + 1] = b, scores[l + 2] = c, scores[l + 3] = d;
    }
    for (int64_t l = whole; l < count; l++) {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; i++) sum += q[i] * keys[l * width + i];
        scores[l] = sum;
    }
#pragma omp simd reduction(max : top)
    for (int64_t l = 0; l < count; l++) {
        scores[l] = scores[l] * scale + mask[l];
        top = scores[l] > top ? scores[l] : top;
    }
#pragma omp simd reduction(+ : total)
    for (int64_t l = 0; l < count; l++) {
        scores[l] = scores[l] == -INFINITY ? 0.0f : exp_of(scores[l] - top);
        total += scores[l];
    }
    memset(seen, 0, (size_t)width * sizeof *seen);
    for (int64_t l = 0; l < whole; l += 4) {
        const float *v = values + l * width, a = scores[l], b = scores[l + 1], c = scores[l + 2], d = scores[l + 3];
#pragma omp simd
        for (int64_t i = 0; i < width; i++)
            seen[i] += (a * v[i] + b * v[width + i]) + (c * v[2 * width + i] + d * v[3 * width + i]);
    }
    for (int64_t l = whole; l < count; l++)
        for (int64_t i = 0; i < width; i++) seen[i] += scores[l] * values[l * width + i];
    for (int64_t i = 0; i < width; i++) seen[i] /= total;
}

KARLA_INLINE void turn_pairs(float *x, const float *turn, int64_t heads, int64_t width) {
    for (int64_t h = 0; h < heads; h++, x += width)
        for (int64_t i = 0; i < width; i += 2) {
            const float real = x[i], imaginary = x[i + 1];
            x[i] = real * turn[i] - imaginary * turn[i + 1];
            x[i + 1] = real * turn[i + 1] + imaginary * turn[i];
        }
}

KARLA_INLINE void silu(float *x, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        const float e = exp_of(-fabsf(x[i]));
        x[i] *= (x[i] >= 0.0f ? 1.0f : e) / (1.0f + e);
    }
}

KARLA_INLINE void add(float *to, const float *change, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] += change[i];
}

static void heads_plain(const karla_stream *s, float *q, const float *turn, const float *keys, const float *values,
                        const float *mask, float *scores, float *seen) {
    turn_pairs(q, turn, s->heads, s->width);
    for (int64_t h = 0; h < s->heads; h++) {
        const int64_t at = h * s->keys * s->width;
        attend(q + h * s->width, keys + at, values + at, mask, s->keys, s->width, scores, seen + h * s->width);
    }
}

#if defined(__x86_64__)
#define FOR(name, set)                                                                                             \
    __attribute__((target(set))) static void name(const karla_stream *s, float *q, const float *turn,             \
                                                  const float *keys, const float *values, const float *mask,      \
                                                  float *scores, float *seen) {                                   \
        turn_pairs(q, turn, s->heads, s->width);                                                                   \
        for (int64_t h = 0; h < s->heads; h++) {                                                                   \
            const int64_t at = h * s->keys * s->width;                                                             \
            attend(q + h * s->width, keys + at, values + at, mask, s->keys, s->width, scores, seen + h * s->width); \
        }                                                                                                          \
    }
FOR(heads_avx2, "avx2,fma")
FOR(heads_avx512, "fma,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#endif

static void apply(const karla_layer *layer, const float *x, float *y) { karla_bitlinear(layer, x, layer->in, 0, y); }

/* keys and values [rows, H, L, d], mask [rows, L], turn [rows, d] (real and imaginary in turn), stream and writes
 * [rows, D], both changed; scratch holds 2 H d + L + D + the hidden size. All float. */
void karla_stream_ticks(const karla_stream *s, const float *keys, const float *values, const float *mask,
                        const float *turn, int64_t rows, int64_t ticks, float *stream, float *writes, float *scratch) {
    const int64_t size = s->heads * s->width, full = s->query->in;
    float *q = scratch, *seen = q + size, *scores = seen + size, *change = scores + s->keys, *hidden = change + full;
    void (*look)(const karla_stream *, float *, const float *, const float *, const float *, const float *, float *, float *) = heads_plain;
#if defined(__x86_64__)
    const int64_t level = karla_level();
    if (level == KARLA_AVX512) look = heads_avx512;
    if (level == KARLA_AVX2) look = heads_avx2;
#endif
    for (int64_t b = 0; b < rows; b++, stream += full, writes += full)
        for (int64_t tick = 0; tick < ticks; tick++) {
            const int64_t at = b * size * s->keys;
            apply(s->query, stream, q);
            look(s, q, turn + b * s->width, keys + at, values + at, mask + b * s->keys, scores, seen);
            apply(s->out, seen, change);
            add(stream, change, full);
            apply(s->in, stream, hidden);
            silu(hidden, s->in->out);
            apply(s->write, hidden, change);
            add(stream, change, full);
            add(writes, change, full);
        }
}
