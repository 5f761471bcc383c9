/* Ticks of the Continuous Thought Machine in decoding: one position of every sequence, in one call. A tick is
 *
 *     s = alpha / sqrt(beta),   o = attention(W_q s),   a = LayerNorm(GLU(W_syn [o, z])),
 *     z_n = GLU(B_n GLU(A_n (last M of a_n) + a) + b),   alpha <- r alpha + z_i z_j
 *
 * as head_karla.KarlaHead does it in torch, up to rounding. */
#include "ticks.h"

typedef struct {
    const karla_layer *query, *synapse;
    karla_heads heads;
    int64_t neurons, history, hidden, pairs; /* N, M, hidden units, all pairs: those that ask come first */
    const float *norm_weight, *norm_bias, *weight_in, *bias_in, *weight_out, *bias_out, *keep;
    const int64_t *left, *right;
    double norm_eps;
} karla_neurons;

/* z [N] from past [N, M], oldest first. */
KARLA_INLINE void fire(const karla_neurons *c, const float *past, float *z) {
    const int64_t wide = 2 * c->hidden;
    float sums[2 * 256], both[2];
    for (int64_t n = 0; n < c->neurons; n++, past += c->history) {
        const float *in = c->weight_in + n * wide * c->history, *out = c->weight_out + n * wide;
        for (int64_t o = 0; o < wide; o++) {
            float sum = c->bias_in[n * wide + o];
#pragma omp simd reduction(+ : sum)
            for (int64_t m = 0; m < c->history; m++) sum += in[o * c->history + m] * past[m];
            sums[o] = sum;
        }
#pragma omp simd
        for (int64_t o = 0; o < c->hidden; o++) sums[o] *= karla_sigmoid(sums[c->hidden + o]);
        for (int64_t i = 0; i < 2; i++) {
            float sum = c->bias_out[2 * n + i];
#pragma omp simd reduction(+ : sum)
            for (int64_t o = 0; o < c->hidden; o++) sum += out[i * c->hidden + o] * sums[o];
            both[i] = sum;
        }
        z[n] = both[0] * karla_sigmoid(both[1]);
    }
}

/* mixed [2 N] to its GLU, normalised, at the end of past. */
KARLA_INLINE void remember(const karla_neurons *c, float *mixed, float *past) {
    double sum = 0.0, square = 0.0;
#pragma omp simd
    for (int64_t n = 0; n < c->neurons; n++) mixed[n] *= karla_sigmoid(mixed[c->neurons + n]);
    for (int64_t n = 0; n < c->neurons; n++) sum += mixed[n];
    const double mean = sum / (double)c->neurons;
    for (int64_t n = 0; n < c->neurons; n++) square += (mixed[n] - mean) * (mixed[n] - mean);
    const float factor = (float)(1.0 / sqrt(square / (double)c->neurons + c->norm_eps));
    for (int64_t n = 0; n < c->neurons; n++, past += c->history) {
        memmove(past, past + 1, (size_t)(c->history - 1) * sizeof *past);
        past[c->history - 1] = (float)(mixed[n] - mean) * factor * c->norm_weight[n] + c->norm_bias[n];
    }
}

#define FOR(name, before)                                                                             \
    before static void name(const karla_neurons *c, float *mixed, float *past, float *z, float *alpha) { \
        remember(c, mixed, past);                                                                     \
        fire(c, past, z);                                                                             \
        for (int64_t p = 0; p < c->pairs; p++)                                                        \
            alpha[p] = c->keep[p] * alpha[p] + z[c->left[p]] * z[c->right[p]];                        \
    }
FOR(react_plain, )
#if defined(__x86_64__)
FOR(react_avx2, __attribute__((target("avx2,fma"))))
FOR(react_avx512, __attribute__((target("fma,avx512f,avx512bw,avx512vl,avx512dq"))))
#endif

static void react(const karla_neurons *c, float *mixed, float *past, float *z, float *alpha) {
#if defined(__x86_64__)
    const int64_t level = karla_level();
    if (level == KARLA_AVX512) react_avx512(c, mixed, past, z, alpha);
    else if (level == KARLA_AVX2) react_avx2(c, mixed, past, z, alpha);
    else
#endif
        react_plain(c, mixed, past, z, alpha);
}

/* factors [ticks, pairs] are 1 / sqrt(beta) before each tick; z [rows, N], past [rows, N, M] and alpha [rows, pairs] are
 * changed; scratch holds asking pairs + H d + L + H d + 3 N. All float. */
void karla_neuron_ticks(const karla_neurons *c, const karla_place *first, const float *factors, int64_t rows,
                        int64_t ticks, float *z, float *past, float *alpha, float *scratch) {
    const int64_t size = c->heads.count * c->heads.width, asking = c->query->in;
    float *action = scratch, *q = action + asking, *scores = q + size, *seen = scores + c->heads.keys;
    float *mixed = seen + size + c->neurons; /* seen and, behind it, a copy of z */
    for (int64_t b = 0; b < rows; b++, z += c->neurons, past += c->neurons * c->history, alpha += c->pairs) {
        const karla_place at = karla_place_of(&c->heads, first, b);
        for (int64_t tick = 0; tick < ticks; tick++) {
            for (int64_t p = 0; p < asking; p++) action[p] = alpha[p] * factors[tick * c->pairs + p];
            karla_bitlinear(c->query, action, asking, 0, q);
            karla_look(&c->heads, q, &at, scores, seen);
            memcpy(seen + size, z, (size_t)c->neurons * sizeof *z);
            karla_bitlinear(c->synapse, seen, size + c->neurons, 0, mixed);
            react(c, mixed, past, z, alpha);
        }
    }
}
