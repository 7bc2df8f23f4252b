/* A boundary's arithmetic (DESIGN section 2) on slices of weights, with the bits of merge.py's eager torch.
 * Compile with -ffp-contract=off: a fused multiply-add where none is written would round differently. */
#include <stdint.h>
#include <string.h>

enum { CHUNK = 1 << 15, TILE = 512, COLUMNS = 4, LANES = 16, BLOCKS = TILE / 4 + 1 };

/* As in compiled.py. */
typedef struct {
    float *accumulator;
    void *storage;       /* bfloat16 or float32; NULL: the accumulator is the weight */
    const double *A, *B; /* (rank, in) and (out, rank); NULL: no expert is added */
    double scaling;
    int64_t start, length, rank, in_features;
    uint32_t seed[2], weight, purpose; /* Philox's key and the last two words of its counter */
    float noise_scale;                 /* 0: no noise is added */
    int32_t bfloat16, keeps, padding;  /* keeps: only the storage is written */
} Slice;

typedef double Columns __attribute__((vector_size(8 * COLUMNS)));

/* Uniform numbers in [0, 1) for 4 * blocks elements from 4 * block on, by Philox-4x32-10. */
static void draw(const Slice *slice, uint64_t block, int blocks, float *restrict uniform) {
    uint32_t c0[BLOCKS], c1[BLOCKS], c2[BLOCKS], c3[BLOCKS], k0 = slice->seed[0], k1 = slice->seed[1];
    for (int i = 0; i < blocks; i++) {
        c0[i] = (uint32_t)(block + i);
        c1[i] = (uint32_t)((block + i) >> 32);
        c2[i] = slice->weight;
        c3[i] = slice->purpose;
    }
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
        for (int i = 0; i < blocks; i++) {
            uint64_t p0 = (uint64_t)c0[i] * 0xD2511F53u, p1 = (uint64_t)c2[i] * 0xCD9E8D57u;
            c0[i] = (uint32_t)(p1 >> 32) ^ c1[i] ^ k0;
            c2[i] = (uint32_t)(p0 >> 32) ^ c3[i] ^ k1;
            c1[i] = (uint32_t)p1;
            c3[i] = (uint32_t)p0;
        }
    for (int i = 0; i < blocks; i++) {
        uniform[4 * i] = (float)(int32_t)(c0[i] >> 8) * 0x1p-24f;
        uniform[4 * i + 1] = (float)(int32_t)(c1[i] >> 8) * 0x1p-24f;
        uniform[4 * i + 2] = (float)(int32_t)(c2[i] >> 8) * 0x1p-24f;
        uniform[4 * i + 3] = (float)(int32_t)(c3[i] >> 8) * 0x1p-24f;
    }
}

/* D of the elements [first, first + length): float32(s * sum of B[row, k] * A[k, column]), k ascending.
 * A product of two float32 numbers is exact in float64: fused or not, the sum would have the same bits. */
static void multiply(const Slice *slice, int64_t first, int length, float *restrict delta) {
    const int64_t in = slice->in_features, rank = slice->rank;
    for (int done = 0; done < length;) {
        int64_t row = (first + done) / in, column = (first + done) % in;
        int width = in - column < length - done ? (int)(in - column) : length - done, j = 0;
        const double *B = slice->B + row * rank, *A = slice->A + column;
        for (; j + 4 * COLUMNS <= width; j += 4 * COLUMNS) {
            Columns sums[4] = {{0}}, a;
            for (int64_t k = 0; k < rank; k++)
                for (int t = 0; t < 4; t++) {
                    memcpy(&a, A + k * in + j + t * COLUMNS, sizeof a);
                    sums[t] += B[k] * a;
                }
            for (int t = 0; t < 4 * COLUMNS; t++) delta[done + j + t] = (float)(slice->scaling * ((double *)sums)[t]);
        }
        for (; j < width; j++) {
            double sum = 0;
            for (int64_t k = 0; k < rank; k++) sum += B[k] * A[k * in + j];
            delta[done + j] = (float)(slice->scaling * sum);
        }
        done += width;
    }
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* To nearest even; in the upper half of the word. */
static inline uint32_t to_bfloat16(float value) {
    uint32_t bits = bits_of(value), up = bits + 0x7FFF + ((bits >> 16) & 1);
    return value != value ? 0x7FC00000u : up & 0xFFFF0000u;
}

static inline float rounded(float value, int bfloat16) {
    uint32_t bits = bfloat16 ? to_bfloat16(value) : bits_of(value);
    memcpy(&value, &bits, 4);
    return value;
}

static double sum_of_squares(const float *restrict values, int length) {
    double sums[LANES] = {0}, sum = 0;
    int i = 0;
    for (; i + LANES <= length; i += LANES)
        for (int t = 0; t < LANES; t++) sums[t] += (double)values[i + t] * values[i + t];
    for (; i < length; i++) sum += (double)values[i] * values[i];
    for (int t = 0; t < LANES; t++) sum += sums[t];
    return sum;
}

/* Add D to the sums; the parts of its change that are not seen in the weights in use, by rounding. */
static inline __attribute__((always_inline)) void merge(float *restrict sums, const float *restrict delta,
                                                        float *restrict missed, int length, int bfloat16) {
    for (int i = 0; i < length; i++) {
        float before = rounded(sums[i], bfloat16);
        sums[i] += delta[i];
        missed[i] = delta[i] - (rounded(sums[i], bfloat16) - before);
    }
}

static void edit_tile(const Slice *slice, int64_t offset, int length, double *squares) {
    float sums[TILE], delta[TILE], missed[TILE], uniform[4 * BLOCKS];
    memcpy(sums, slice->accumulator + offset, 4 * (size_t)length);
    if (slice->A) {
        multiply(slice, slice->start + offset, length, delta);
        if (slice->bfloat16) merge(sums, delta, missed, length, 1);
        else merge(sums, delta, missed, length, 0);
        squares[0] += sum_of_squares(delta, length);
        squares[1] += sum_of_squares(missed, length);
    }
    if (slice->noise_scale != 0) {
        int skipped = (int)((slice->start + offset) % 4);
        draw(slice, (uint64_t)(slice->start + offset) / 4, (skipped + length + 3) / 4, uniform);
        for (int i = 0; i < length; i++) sums[i] += (uniform[skipped + i] - 0.5f) * slice->noise_scale;
    }
    if (!slice->keeps) memcpy(slice->accumulator + offset, sums, 4 * (size_t)length);
    if (slice->storage && slice->bfloat16) {
        uint16_t *storage = (uint16_t *)slice->storage + offset;
        for (int i = 0; i < length; i++) storage[i] = (uint16_t)(to_bfloat16(sums[i]) >> 16);
    } else if (slice->storage)
        memcpy((float *)slice->storage + offset, sums, 4 * (size_t)length);
}

/* The elements [first, last) of the slice, in tiles; of wide rows the same columns of all first, for A stays near. */
static void edit_chunk(const Slice *slice, int64_t first, int64_t last, double *squares) {
    int64_t in = slice->in_features, begin = slice->start + first, end = slice->start + last;
    if (!slice->A || in <= TILE) {
        for (; first < last; first += TILE)
            edit_tile(slice, first, (int)(last - first < TILE ? last - first : TILE), squares);
        return;
    }
    for (int64_t column = 0; column < in; column += TILE)
        for (int64_t row = begin / in; row * in < end; row++) {
            int64_t from = row * in + column, to = row * in + (column + TILE < in ? column + TILE : in);
            if (from < begin) from = begin;
            if (to > end) to = end;
            if (from < to) edit_tile(slice, from - slice->start, (int)(to - from), squares);
        }
}

/* Edit the chunks [first, last) of all slices, counted through; of each chunk the two sums of squares. */
void edit(const Slice *slice, int64_t first, int64_t last, double *squares) {
    for (int64_t chunk = 0; chunk < last; slice++)
        for (int64_t offset = 0; offset < slice->length && chunk < last; offset += CHUNK, chunk++) {
            if (chunk < first) continue;
            squares[2 * chunk] = squares[2 * chunk + 1] = 0;
            edit_chunk(slice, offset, offset + CHUNK < slice->length ? offset + CHUNK : slice->length,
                       squares + 2 * chunk);
        }
}
