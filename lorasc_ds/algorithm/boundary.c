/* A boundary's arithmetic (DESIGN section 2) on slices of weights, with the bits of merge.py's eager torch.
 * Compile with -ffp-contract=off: a fused multiply-add where none is written would round differently. */
#include <stdint.h>
#include <string.h>

enum { CHUNK = 1 << 15, TILE = 1024, COLUMNS = 16, LANES = 16, BLOCKS = TILE / 4 };

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

/* A product of two float32 numbers is exact in float64: fused or not, the sum has the same bits. */
#ifdef __FMA__
#define ADD_PRODUCT(sum, a, b) __builtin_fma(a, b, sum)
#else
#define ADD_PRODUCT(sum, a, b) ((sum) + (a) * (b))
#endif

/* Uniform numbers in [0, 1) for TILE elements from 4 * block on, by Philox-4x32-10. */
static void draw(const Slice *slice, uint64_t block, float *restrict uniform) {
    uint32_t c0[BLOCKS], c1[BLOCKS], c2[BLOCKS], c3[BLOCKS], k0 = slice->seed[0], k1 = slice->seed[1];
    for (int i = 0; i < BLOCKS; i++) {
        c0[i] = (uint32_t)(block + i);
        c1[i] = (uint32_t)((block + i) >> 32);
        c2[i] = slice->weight;
        c3[i] = slice->purpose;
    }
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
        for (int i = 0; i < BLOCKS; i++) {
            uint64_t p0 = (uint64_t)c0[i] * 0xD2511F53u, p1 = (uint64_t)c2[i] * 0xCD9E8D57u;
            c0[i] = (uint32_t)(p1 >> 32) ^ c1[i] ^ k0;
            c2[i] = (uint32_t)(p0 >> 32) ^ c3[i] ^ k1;
            c1[i] = (uint32_t)p1;
            c3[i] = (uint32_t)p0;
        }
    for (int i = 0; i < BLOCKS; i++) {
        uniform[4 * i] = (float)(int32_t)(c0[i] >> 8) * 0x1p-24f;
        uniform[4 * i + 1] = (float)(int32_t)(c1[i] >> 8) * 0x1p-24f;
        uniform[4 * i + 2] = (float)(int32_t)(c2[i] >> 8) * 0x1p-24f;
        uniform[4 * i + 3] = (float)(int32_t)(c3[i] >> 8) * 0x1p-24f;
    }
}

/* D of the elements [first, first + length): float32(s * sum of B[row, k] * A[k, column]), k ascending. */
static void multiply(const Slice *slice, int64_t first, int length, float *restrict delta) {
    const int64_t in = slice->in_features, rank = slice->rank;
    for (int done = 0; done < length;) {
        int64_t row = (first + done) / in, column = (first + done) % in;
        int width = in - column < length - done ? (int)(in - column) : length - done, j = 0;
        const double *B = slice->B + row * rank, *A = slice->A + column;
        for (; j + COLUMNS <= width; j += COLUMNS) {
            double sums[COLUMNS] = {0};
            for (int64_t k = 0; k < rank; k++)
                for (int t = 0; t < COLUMNS; t++) sums[t] = ADD_PRODUCT(sums[t], B[k], A[k * in + j + t]);
            for (int t = 0; t < COLUMNS; t++) delta[done + j + t] = (float)(slice->scaling * sums[t]);
        }
        for (; j < width; j++) {
            double sum = 0;
            for (int64_t k = 0; k < rank; k++) sum = ADD_PRODUCT(sum, B[k], A[k * in + j]);
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

static void edit_tile(const Slice *slice, int64_t offset, int length, double *squares) {
    float sums[TILE], change[TILE], missed[TILE], uniform[TILE];
    memcpy(sums, slice->accumulator + offset, 4 * (size_t)length);
    if (slice->A) {
        multiply(slice, slice->start + offset, length, change);
        for (int i = 0; i < length; i++) {
            float before = rounded(sums[i], slice->bfloat16);
            sums[i] += change[i];
            missed[i] = change[i] - (rounded(sums[i], slice->bfloat16) - before);
        }
        squares[0] += sum_of_squares(change, length);
        squares[1] += sum_of_squares(missed, length);
    }
    if (slice->noise_scale != 0) {
        int skipped = (int)((slice->start + offset) % 4);
        draw(slice, (uint64_t)(slice->start + offset) / 4, uniform);
        for (int i = 0; i < length; i++) sums[i] += (uniform[skipped + i] - 0.5f) * slice->noise_scale;
    }
    if (!slice->keeps) memcpy(slice->accumulator + offset, sums, 4 * (size_t)length);
    if (slice->storage && slice->bfloat16) {
        uint16_t *storage = (uint16_t *)slice->storage + offset;
        for (int i = 0; i < length; i++) storage[i] = (uint16_t)(to_bfloat16(sums[i]) >> 16);
    } else if (slice->storage)
        memcpy((float *)slice->storage + offset, sums, 4 * (size_t)length);
}

/* Edit the chunks [first, last) of all slices, counted through; of each chunk the two sums of squares. */
void edit(const Slice *slice, int64_t first, int64_t last, double *squares) {
    for (int64_t chunk = 0; chunk < last; slice++)
        for (int64_t offset = 0; offset < slice->length && chunk < last; offset += CHUNK, chunk++) {
            if (chunk < first) continue;
            int64_t end = offset + CHUNK < slice->length ? offset + CHUNK : slice->length;
            squares[2 * chunk] = squares[2 * chunk + 1] = 0;
            for (int64_t at = offset; at < end;) { /* up to the next multiple of TILE of the whole weight */
                int64_t room = TILE - (slice->start + at) % TILE;
                int length = (int)(room < end - at ? room : end - at);
                edit_tile(slice, at, length, squares + 2 * chunk);
                at += length;
            }
        }
}
