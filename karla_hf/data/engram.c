/* The memory's two hot loops: naming positions, and adding the rows of their names to a state.
 * Both do what hashing_karla.name_positions and engram_karla.Engram.read do in numpy and torch, with the same sums in the
 * same order, so the results are equal bit for bit. Nothing is allocated. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

enum { BUCKET = 8, AHEAD = 16, NEAR = 4 };

static uint64_t scramble(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    x ^= x >> 31;
    return x ? x : 1;
}

enum { ENDS = 1, BREAKS = 2, BEGINS = 4 };

static int flags_of(int64_t token, const uint8_t *boundaries) { return token < 0 ? BREAKS : boundaries[token]; }

/* history [batch, length] token ids, negative where there is none; token_map and boundaries by token id; multipliers
 * [reach]; orders and sentence [families]; names [batch, length - reach + 1, families]. */
void karla_name_positions(const int64_t *history, int64_t batch, int64_t length, const int64_t *token_map,
                          const uint8_t *boundaries, const int64_t *multipliers, const int64_t *orders,
                          int64_t families, int64_t reach, const int64_t *sentence, const int64_t *shortest,
                          int64_t pad, uint64_t stride, int64_t *names) {
    for (int64_t b = 0; b < batch; b++, history += length)
        for (int64_t t = reach - 1; t < length; t++, names += families) {
            uint64_t mix = 0, inside = 0; /* of all tokens, and of those of the sentence */
            int unfilled = 0, closed = 0;
            int64_t age = length;
            for (int64_t k = 0; k < reach; k++) {
                const int64_t token = history[t - k];
                const uint64_t id = token < 0 ? pad : token_map[token];
                unfilled |= token < 0 && k < *shortest;
                mix ^= id * (uint64_t)multipliers[k];
                inside ^= (closed ? (uint64_t)pad : id) * (uint64_t)multipliers[k];
                for (int64_t f = 0; f < families; f++)
                    if (orders[f] == k + 1)
                        names[f] = (int64_t)scramble((sentence[f] ? inside : mix) + (uint64_t)(f + 1) * stride);
                if (!closed && t - k > 0) {
                    const int before = flags_of(history[t - k - 1], boundaries);
                    if (before & BREAKS || (before & ENDS && flags_of(token, boundaries) & BEGINS)) closed = 1, age = k;
                }
            }
            for (int64_t f = 0; f < families; f++)
                if (sentence[f] ? age + 1 < orders[f] / 2 : unfilled) names[f] = 0;
        }
}

static const int64_t *bucket_of(const int64_t *table, uint64_t buckets, uint64_t half) {
    return table + ((half * buckets) >> 32) * BUCKET;
}

static int64_t find(const int64_t *table, uint64_t buckets, int64_t name) {
    const uint64_t halves[2] = {(uint64_t)name & 0xffffffffu, (uint64_t)name >> 32};
    if (name == 0) return -1;
    for (int h = 0; h < 2; h++) {
        const int64_t *bucket = bucket_of(table, buckets, halves[h]);
        for (int64_t i = 0; i < BUCKET; i++)
            if (bucket[i] == name) return bucket - table + i;
    }
    return -1;
}

static void prefetch_buckets(const int64_t *table, uint64_t buckets, int64_t name) {
    __builtin_prefetch(bucket_of(table, buckets, (uint64_t)name & 0xffffffffu));
    __builtin_prefetch(bucket_of(table, buckets, (uint64_t)name >> 32));
}

static float widen(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16, rest = half & 0x7fffu;
    uint32_t bits;
    float value;
    if (rest >= 0x7c00u) {
        bits = sign | 0x7f800000u | (rest & 0x3ffu) << 13;
    } else if (rest >= 0x400u) {
        bits = sign | (rest + 0x1c000u) << 13;
    } else { /* zero or subnormal: rest * 2^-24 */
        value = (float)rest * 5.9604644775390625e-8f;
        memcpy(&bits, &value, sizeof bits);
        bits |= sign;
    }
    memcpy(&value, &bits, sizeof value);
    return value;
}

static void add_run(float *out, const uint16_t *row, int64_t count) {
    int64_t i = 0;
#ifdef __F16C__
    for (; i + 8 <= count; i += 8) {
        const __m256 value = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(row + i)));
        _mm256_storeu_ps(out + i, _mm256_add_ps(_mm256_loadu_ps(out + i), value));
    }
#endif
    for (; i < count; i++) out[i] += widen(row[i]);
}

/* names [positions, families]; table [buckets, 8] names; rows [buckets * 8, width] half floats; starts [families], first
 * coordinate of each family; state [positions, hidden], added to. */
void karla_add_rows(const int64_t *names, int64_t positions, int64_t families, const int64_t *table, int64_t buckets,
                    const uint16_t *rows, int64_t width, const int64_t *starts, int64_t hidden, float *state) {
    const int64_t count = positions * families;
    int64_t slots[NEAR];
    for (int64_t i = 0; i < count && i < AHEAD; i++) prefetch_buckets(table, (uint64_t)buckets, names[i]);
    for (int64_t i = 0; i < count + NEAR; i++) {
        if (i >= NEAR && slots[i % NEAR] >= 0) {
            const uint16_t *row = rows + slots[i % NEAR] * width;
            const int64_t at = i - NEAR, start = starts[at % families];
            const int64_t run = width < hidden - start ? width : hidden - start;
            float *out = state + at / families * hidden;
            add_run(out + start, row, run);
            add_run(out, row + run, width - run);
        }
        if (i + AHEAD < count) prefetch_buckets(table, (uint64_t)buckets, names[i + AHEAD]);
        slots[i % NEAR] = i < count ? find(table, (uint64_t)buckets, names[i]) : -1;
        if (slots[i % NEAR] >= 0) {
            const char *row = (const char *)(rows + slots[i % NEAR] * width);
            for (int64_t line = 0; line < width * 2; line += 64) __builtin_prefetch(row + line);
        }
    }
}

static float dot(const float *a, const float *b, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* Log-odds of the target against its candidates and the rest after the state has moved, and the direction
 * W_target - mean competitor. embeddings [count, hidden], the target's first; logits [count], -inf for a duplicate. */
static float face_rivals(const float *embeddings, const float *logits, int64_t count, float rest, const float *mean,
                         const float *moved, int64_t hidden, float *mass, float *direction) {
    float largest = rest, total = 0.0f;
    for (int64_t c = 0; c < count; c++) {
        mass[c] = logits[c] + (isinf(logits[c]) ? 0.0f : dot(embeddings + c * hidden, moved, hidden));
        if (c && mass[c] > largest) largest = mass[c];
    }
    const float odds = mass[0];
    for (int64_t c = 1; c < count; c++) total += mass[c] = expf(mass[c] - largest);
    const float others = expf(rest - largest);
    total += others;
    for (int64_t i = 0; i < hidden; i++) direction[i] = embeddings[i] - others / total * mean[i];
    for (int64_t c = 1; c < count; c++) {
        const float share = mass[c] / total;
        if (share > 0.0f)
            for (int64_t i = 0; i < hidden; i++) direction[i] -= share * embeddings[c * hidden + i];
    }
    return odds - largest - logf(total);
}

/* The repeats of writing_karla._correct. P positions, F families, U distinct names, K candidates with the target first.
 * place [P, F] distinct name of each family; share [P, F] its weight, 0 without a row; scratch: direction and moved [P, D],
 * mass [K], uses [U]; active [P] in and out, 1 where a position may be corrected; delta [U, width] from zero;
 * log_odds [P]. */
void karla_correct(int64_t positions, int64_t families, int64_t names, int64_t count, int64_t hidden, int64_t width,
                   const int64_t *starts, const float *embeddings, const float *logits, const float *rest,
                   const float *mean, const int64_t *place, const float *share, const float *rule, int64_t repeats,
                   float *direction, float *moved, float *mass, int64_t *uses, int64_t *active, float *delta,
                   float *log_odds) {
    const float aim = rule[0], goal = rule[1], max_margin = rule[2], least_coverage = rule[3],
                least_separation = rule[4], sign = rule[5];
    memset(moved, 0, positions * hidden * sizeof *moved);
    for (int64_t r = 0; r <= repeats; r++) {
        int64_t left = 0;
        memset(uses, 0, names * sizeof *uses);
        for (int64_t p = 0; p < positions; p++) { /* look, and decide on a change */
            if (r && !active[p]) continue;
            float *d = direction + p * hidden, *m = moved + p * hidden;
            const float *own = embeddings + p * count * hidden;
            log_odds[p] = face_rivals(own, logits + p * count, count, rest[p], mean, m, hidden, mass, d);
            if (r == repeats || !active[p] || !(sign * (aim - log_odds[p]) > 0.0f)) {
                active[p] = 0;
                continue;
            }
            float reached = 0.0f;
            for (int64_t f = 0; f < families; f++) {
                const float weight = share[p * families + f];
                const int64_t run = width < hidden - starts[f] ? width : hidden - starts[f];
                if (weight == 0.0f) continue;
                reached += weight * (dot(d + starts[f], d + starts[f], run) + dot(d, d, width - run));
                uses[place[p * families + f]]++;
            }
            const float floor = fmaxf(least_coverage * dot(d, d, hidden), least_separation * dot(own, own, hidden));
            const float margin = fminf(fmaxf(goal - log_odds[p], -max_margin), max_margin);
            const float step = margin / fmaxf(reached, floor);
            for (int64_t i = 0; i < hidden; i++) d[i] *= step;
            left++;
        }
        if (!left) return;
        for (int64_t p = 0; p < positions; p++) /* the mean of the changes that share a row */
            for (int64_t f = 0; active[p] && f < families; f++) {
                const float weight = share[p * families + f];
                const int64_t run = width < hidden - starts[f] ? width : hidden - starts[f];
                if (weight == 0.0f) continue;
                const float scale = weight / (float)uses[place[p * families + f]];
                float *row = delta + place[p * families + f] * width;
                const float *d = direction + p * hidden;
                for (int64_t i = 0; i < run; i++) row[i] += scale * d[starts[f] + i];
                for (int64_t i = run; i < width; i++) row[i] += scale * d[i - run];
            }
        for (int64_t p = 0; p < positions; p++) {
            if (!active[p]) continue;
            float *m = moved + p * hidden;
            memset(m, 0, hidden * sizeof *m);
            for (int64_t f = 0; f < families; f++) {
                const int64_t run = width < hidden - starts[f] ? width : hidden - starts[f];
                const float *row = delta + place[p * families + f] * width;
                if (share[p * families + f] == 0.0f) continue;
                for (int64_t i = 0; i < run; i++) m[starts[f] + i] += row[i];
                for (int64_t i = run; i < width; i++) m[i - run] += row[i];
            }
        }
    }
}
