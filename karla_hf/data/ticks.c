/* Turns of the residual stream of decoding: one position of every sequence, all ticks in one call. A turn is
 *
 *     r <- r + W_o attention(W_r r),   r <- r + w,  w = W_2 silu(W_1 r),   writes <- writes + w
 *
 * as head_karla.KarlaHead does it in torch, up to rounding. */
#include "ticks.h"

/* The four layers of the stream. */
typedef struct {
    const karla_layer *query, *out, *in, *write;
    karla_heads heads;
} karla_stream;

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
        scores[l] = scores[l] == -INFINITY ? 0.0f : karla_exp(scores[l] - top);
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
        const float e = karla_exp(-fabsf(x[i]));
        x[i] *= (x[i] >= 0.0f ? 1.0f : e) / (1.0f + e);
    }
}

KARLA_INLINE void add(float *to, const float *change, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] += change[i];
}

#define FOR(name, before)                                                                                          \
    before static void name(const karla_heads *heads, float *q, const karla_place *at, float *scores, float *seen) { \
        const int64_t width = heads->width, step = heads->keys * width;                                            \
        turn_pairs(q, at->turn, heads->count, width);                                                              \
        for (int64_t h = 0; h < heads->count; h++)                                                                 \
            attend(q + h * width, at->keys + h * step, at->values + h * step, at->mask, heads->keys, width, scores, \
                   seen + h * width);                                                                              \
    }
FOR(look_plain, )
#if defined(__x86_64__)
FOR(look_avx2, __attribute__((target("avx2,fma"))))
FOR(look_avx512, __attribute__((target("fma,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"))))
#endif

void karla_look(const karla_heads *heads, float *q, const karla_place *at, float *scores, float *seen) {
#if defined(__x86_64__)
    const int64_t level = karla_level();
    if (level == KARLA_AVX512) look_avx512(heads, q, at, scores, seen);
    else if (level == KARLA_AVX2) look_avx2(heads, q, at, scores, seen);
    else
#endif
        look_plain(heads, q, at, scores, seen);
}

karla_place karla_place_of(const karla_heads *heads, const karla_place *first, int64_t row) {
    const int64_t step = heads->count * heads->keys * heads->width;
    return (karla_place){first->keys + row * step, first->values + row * step, first->mask + row * heads->keys,
                         first->turn + row * heads->width};
}

static void apply(const karla_layer *layer, const float *x, float *y) { karla_bitlinear(layer, x, layer->in, 0, y); }

/* stream and writes [rows, D] are changed; scratch holds 2 H d + L + D + the hidden size. All float. */
void karla_stream_ticks(const karla_stream *s, const karla_place *first, int64_t rows, int64_t ticks, float *stream,
                        float *writes, float *scratch) {
    const int64_t size = s->heads.count * s->heads.width, full = s->query->in;
    float *q = scratch, *seen = q + size, *scores = seen + size, *change = scores + s->heads.keys, *hidden = change + full;
    for (int64_t b = 0; b < rows; b++, stream += full, writes += full) {
        const karla_place at = karla_place_of(&s->heads, first, b);
        for (int64_t tick = 0; tick < ticks; tick++) {
            apply(s->query, stream, q);
            karla_look(&s->heads, q, &at, scores, seen);
            apply(s->out, seen, change);
            add(stream, change, full);
            apply(s->in, stream, hidden);
            silu(hidden, s->in->out);
            apply(s->write, hidden, change);
            add(stream, change, full);
            add(writes, change, full);
        }
    }
}
