// y[i, n] = (y[i, n] + sum_r h[i, r] * b[p, r, n]) * scale[p, n] + shift[p, n], h[i, r] = sum_k x[i, k] * a[p, r, k],
// in float32, for rows i of position p; bfloat16 in memory. All parts of a stacked linear in one call, in two phases: h
// by tiles of rows and chunks of ranks, then y by tiles of rows and chunks of outputs. Compiled by native.py.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int ROWS = 8;       // of a tile, the most; and sums at once, which hide a multiplication's latency
constexpr int LANES = 16;     // of one vector of sums
constexpr int RANKS = 16;     // of a chunk of the first phase
constexpr int OUTPUTS = 256;  // of a chunk of the second

// GCC's and Clang's vectors: whatever the processor has becomes of them.
typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

inline Floats widen(const uint16_t *numbers, int64_t count) {  // the first `count`, and zeros
    Halves halves = {};
    if (count >= LANES)
        std::memcpy(&halves, numbers, sizeof halves);
    else if (count > 0)
        std::memcpy(&halves, numbers, count * 2);
    return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
}

inline float widen(uint16_t number) {
    uint32_t bits = static_cast<uint32_t>(number) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

inline uint16_t narrow(float number) {  // to the nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &number, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 64 : rounded);
}

struct Tile {
    int32_t position, first, end;  // places in the order of rows
};

// h of a tile of N rows for ranks [first, last), ROWS / N at once. wide [N, padded]: the rows' x, zeros behind it.
template <int N>
void shrink(const float *wide, int64_t padded, const uint16_t *a, int64_t in, int64_t first, int64_t last, float *h,
            int64_t stride_h, int num_rows) {
    constexpr int AT_ONCE = ROWS / N;
    for (int64_t rank = first; rank < last; rank += AT_ONCE) {
        Floats sums[AT_ONCE][N] = {};
        for (int64_t k = 0; k < padded; k += LANES) {
            Floats x[N];
            for (int i = 0; i < N; i++) std::memcpy(&x[i], wide + i * padded + k, sizeof x[i]);
            for (int j = 0; j < AT_ONCE; j++) {
                const Floats row = widen(a + std::min(rank + j, last - 1) * in + k, in - k);
                for (int i = 0; i < N; i++) sums[j][i] += row * x[i];
            }
        }
        for (int j = 0; j < AT_ONCE && rank + j < last; j++)
            for (int i = 0; i < num_rows; i++) {
                float sum = 0;
                for (int lane = 0; lane < LANES; lane++) sum += sums[j][i][lane];
                h[i * stride_h + rank + j] = sum;
            }
    }
}

// sums [N, OUTPUTS] = h @ b for `count` outputs of one part, ROWS / N vectors at once. h: of each row, the part's.
template <int N>
void expand(const float *const *h, int64_t num_ranks, const uint16_t *b, int64_t stride_b, int64_t count, float *sums) {
    constexpr int AT_ONCE = ROWS / N;
    for (int64_t n = 0; n < count; n += AT_ONCE * LANES) {
        Floats totals[AT_ONCE][N] = {};
        for (int64_t r = 0; r < num_ranks; r++)
            for (int j = 0; j < AT_ONCE; j++) {
                const int64_t at = n + j * LANES;
                const Floats column = widen(b + r * stride_b + at, count - at);
                for (int i = 0; i < N; i++) totals[j][i] += column * h[i][r];
            }
        for (int j = 0; j < AT_ONCE; j++)
            for (int i = 0; i < N; i++) std::memcpy(sums + i * OUTPUTS + n + j * LANES, &totals[j][i], LANES * 4);
    }
}

}  // namespace

extern "C" {

struct Slot {                  // as in placement.py
    const uint16_t *a, *b;     // [max_loras, num_ranks, in_features], [max_loras, max_rank, out_features]
    const float *scale, *shift;
    const int32_t *table;      // [max_loras, 2 + 5 * num_parts]
    int64_t in_features, out_features, num_ranks, max_rank, num_parts;
};

// Row order[place] is changed, for the places of all tiles. h: room for [number of places, num_ranks].
void add_rows_by_adapter(const Slot *slot, const uint16_t *x, int64_t stride_x, uint16_t *y, int64_t stride_y,
                         const Tile *tiles, int64_t num_tiles, const int32_t *order, float *h) {
    const int64_t in = slot->in_features, out = slot->out_features, ranks = slot->num_ranks;
    const int64_t width = 2 + 5 * slot->num_parts, padded = (in + LANES - 1) / LANES * LANES;
    const int64_t rank_chunks = (ranks + RANKS - 1) / RANKS;
    const int64_t output_chunks = out / OUTPUTS + slot->num_parts;  // at most: each part begins one
#pragma omp parallel
    {
        std::vector<float> wide(ROWS * padded);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < num_tiles * rank_chunks; task++) {
            const Tile tile = tiles[task / rank_chunks];
            const int64_t first = task % rank_chunks * RANKS;
            const int64_t last = std::min<int64_t>(first + RANKS, slot->table[tile.position * width]);
            if (first >= last) continue;
            const int num_rows = tile.end - tile.first;
            for (int i = 0; i < num_rows; i++) {
                const uint16_t *row = x + order[tile.first + i] * stride_x;
                for (int64_t k = 0; k < in; k++) wide[i * padded + k] = widen(row[k]);
            }
            const auto run = num_rows > 4 ? shrink<8> : num_rows > 2 ? shrink<4> : num_rows > 1 ? shrink<2> : shrink<1>;
            run(wide.data(), padded, slot->a + tile.position * ranks * in, in, first, last, h + tile.first * ranks,
                ranks, num_rows);
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < num_tiles * output_chunks; task++) {
            const Tile tile = tiles[task / output_chunks];
            const int32_t *part = slot->table + tile.position * width + 2;  // start, rank, flags, outputs from, to
            int64_t chunk = task % output_chunks, index = 0;
            for (; index < slot->num_parts; index++, part += 5) {
                const int64_t chunks = (part[4] - part[3] + OUTPUTS - 1) / OUTPUTS;
                if (chunk < chunks) break;
                chunk -= chunks;
            }
            if (index == slot->num_parts) continue;
            const int64_t begin = part[3] + chunk * OUTPUTS, count = std::min<int64_t>(OUTPUTS, part[4] - begin);
            const int num_rows = tile.end - tile.first;
            const float *rows[ROWS];
            for (int i = 0; i < ROWS; i++) rows[i] = h + std::min(tile.first + i, tile.end - 1) * ranks + part[0];
            float sums[ROWS * OUTPUTS];
            const auto run = num_rows > 4 ? expand<8> : num_rows > 2 ? expand<4> : num_rows > 1 ? expand<2> : expand<1>;
            run(rows, part[1], slot->b + tile.position * slot->max_rank * out + begin, out, count, sums);
            const float *scale = slot->scale + tile.position * out + begin;
            const float *shift = slot->shift + tile.position * out + begin;
            for (int i = 0; i < num_rows; i++) {
                uint16_t *row = y + order[tile.first + i] * stride_y + begin;
                float *sum = sums + i * OUTPUTS;
                for (int64_t n = 0; n < count; n++) sum[n] += widen(row[n]);
                if (part[2] & 1)
                    for (int64_t n = 0; n < count; n++) sum[n] *= scale[n];
                if (part[2] & 2)
                    for (int64_t n = 0; n < count; n++) sum[n] += shift[n];
                for (int64_t n = 0; n < count; n++) row[n] = narrow(sum[n]);
            }
        }
    }
}
}
