/* What the loops over ticks share. */
#ifndef KARLA_TICKS_H
#define KARLA_TICKS_H
#include "bitlinear.h"

/* Attention: heads, their width d (even), keys L of a sequence. */
typedef struct {
    int64_t count, width, keys;
} karla_heads;

/* Where the keys and values [rows, H, L, d], the mask [rows, L], added, and the rotation of the queries [rows, d] (real and
 * imaginary in turn) lie. */
typedef struct {
    const float *keys, *values, *mask, *turn;
} karla_place;

karla_place karla_place_of(const karla_heads *heads, const karla_place *first, int64_t row);
/* seen [H, d] from q [H, d], which is rotated in place; scores [L] is scratch. */
void karla_look(const karla_heads *heads, float *q, const karla_place *at, float *scores, float *seen);

/* exp(x) for x <= 0, relative error below 2e-7: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. */
KARLA_INLINE float karla_exp(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float n = rintf(x * 1.44269504f), r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const float p = 1.0f + r * (1.0f + r * (0.5f + r * (0.166666667f + r * (4.16666667e-2f + r * (8.33333333e-3f + r * 1.38888889e-3f)))));
    const int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

/* Logistic function. */
KARLA_INLINE float karla_sigmoid(float x) {
    const float e = karla_exp(-fabsf(x));
    return (x >= 0.0f ? 1.0f : e) / (1.0f + e);
}
#endif
