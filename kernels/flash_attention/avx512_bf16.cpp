// Attention of bfloat16 tensors by AVX-512's dot products of bfloat16 pairs (vdpbf16ps).
//
// One task is 64 queries of one head. Everything is held transposed, queries along the lanes: scores [key][query], the
// result [channel][query]. So maxima and sums over keys are plain vector operations, keys and values are read as
// broadcast pairs of bfloat16, and no result is ever reduced across lanes. Keys are read where they lie; values are
// interleaved once, rows 2j and 2j+1 channel by channel, as a product over keys takes them in pairs.
#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512BF16__)
#error "AVX-512 with dot products of bfloat16 pairs is needed: GCC 10 or Clang 9, with -mavx512f -mavx512bw -mavx512bf16"
#endif

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr int QUERIES = 64;           // of a task
constexpr int VECTORS = QUERIES / 16;
constexpr int KEYS = 96;              // of a block between two rescalings
constexpr int ROWS = 6;               // of a register tile, of VECTORS vectors each: 24 of 32 registers are sums

inline __m512bh broadcast_pair(const void* at) {
    int pair;
    std::memcpy(&pair, at, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

// 2^x for x <= 0: relative error 7.5e-5, a fiftieth of what rounding to bfloat16 does to it; `fine`: 9.1e-8, and exact
// for 0. NaN stays NaN.
template <bool fine = false>
inline __m512 exp2_of(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 part = _mm512_sub_ps(x, whole);
    __m512 power;
    if constexpr (fine) {
        power = _mm512_set1_ps(1.32647273e-3f);
        for (const float next : {9.67151299e-3f, 5.55073358e-2f, 2.40222424e-1f, 6.93147004e-1f, 1.0f})
            power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(next));
    } else {
        power = _mm512_set1_ps(0.05517167f);
        for (const float next : {0.24261113f, 0.69326099f, 0.99992807f})
            power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(next));
    }
    return _mm512_scalef_ps(power, whole);
}

// Two vectors of floats as bfloat16 pairs: lane i holds (even[i], odd[i]), the even one in the lower half.
inline __m512i paired(__m512 even, __m512 odd) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, halves);
}

struct Task {
    alignas(64) float scores[KEYS][QUERIES];
    alignas(64) uint32_t shares[KEYS / 2][QUERIES];  // softmax numerators, pairs of keys
    alignas(64) float largest[QUERIES], sum[QUERIES], scaled[QUERIES];
};

// `rows` keys against all queries of a task; folds the scores into `largest`.
template <int rows>
inline void score(const uint16_t* keys, int64_t stride, const uint32_t* queries, int pairs, float (*scores)[QUERIES],
                  __m512 (&largest)[VECTORS]) {
    __m512 sums[rows][VECTORS];
    for (int r = 0; r < rows; ++r)
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_setzero_ps();
    for (int pair = 0; pair < pairs; ++pair) {
        __m512bh lanes[VECTORS];
        for (int v = 0; v < VECTORS; ++v) lanes[v] = (__m512bh)_mm512_load_si512(queries + pair * QUERIES + 16 * v);
        for (int r = 0; r < rows; ++r) {
            const __m512bh key = broadcast_pair(keys + r * stride + 2 * pair);
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], lanes[v], key);
        }
    }
    for (int r = 0; r < rows; ++r)
        for (int v = 0; v < VECTORS; ++v) {
            _mm512_store_ps(scores[r] + 16 * v, sums[r][v]);
            largest[v] = _mm512_max_ps(largest[v], sums[r][v]);
        }
}

// `rows` channels of the result: what there is, scaled, and the values of `pairs` pairs of keys.
template <int rows>
inline void gather(const uint32_t* values, int channels, const uint32_t (*shares)[QUERIES], int pairs,
                   const float* scaled, bool first, float* result) {
    __m512 sums[rows][VECTORS];
    for (int r = 0; r < rows; ++r)
        for (int v = 0; v < VECTORS; ++v)
            sums[r][v] = first ? _mm512_setzero_ps()
                               : _mm512_mul_ps(_mm512_load_ps(result + r * QUERIES + 16 * v), _mm512_load_ps(scaled + 16 * v));
    for (int pair = 0; pair < pairs; ++pair) {
        __m512bh lanes[VECTORS];
        for (int v = 0; v < VECTORS; ++v) lanes[v] = (__m512bh)_mm512_load_si512(shares[pair] + 16 * v);
        for (int r = 0; r < rows; ++r) {
            const __m512bh value = broadcast_pair(values + int64_t(pair) * channels + r);
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], lanes[v], value);
        }
    }
    for (int r = 0; r < rows; ++r)
        for (int v = 0; v < VECTORS; ++v) _mm512_store_ps(result + r * QUERIES + 16 * v, sums[r][v]);
}

}  // namespace

// Sizes: batch, heads, key heads, queries, keys, channels of a key (even), channels of a value (even).
// Strides, in elements: of query, key, value and result each batch, head, row; the last dimension is dense.
// `interleaved` has room for [batch, key heads, (keys + 1) / 2, value channels] pairs, `space` for `threads` results.
extern "C" int ditopt_attention(const uint16_t* query, const uint16_t* key, const uint16_t* value, uint16_t* out,
                                 uint32_t* interleaved, float* space, const int64_t* sizes, const int64_t* strides,
                                 float scale, int threads) {
    const int64_t batch = sizes[0], heads = sizes[1], key_heads = sizes[2], queries = sizes[3], keys = sizes[4];
    const int depth = int(sizes[5]), channels = int(sizes[6]), depth_pairs = depth / 2;
    const int64_t *of_query = strides, *of_key = strides + 3, *of_value = strides + 6, *of_out = strides + 9;
    const int64_t key_pairs = (keys + 1) / 2, tiles = (queries + QUERIES - 1) / QUERIES;
    const int64_t room = int64_t(channels) * QUERIES + int64_t(depth_pairs) * QUERIES;
    const float to_exponent = scale * 1.44269504088896f;
    const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());

#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < batch * key_heads * key_pairs; ++row) {
            const int64_t pair = row % key_pairs, head = row / key_pairs % key_heads, b = row / key_pairs / key_heads;
            const uint16_t* even = value + b * of_value[0] + head * of_value[1] + 2 * pair * of_value[2];
            const bool whole = 2 * pair + 1 < keys;
            const uint16_t* odd = even + of_value[2];
            uint32_t* to = interleaved + row * channels;
            for (int c = 0; c < channels; ++c) to[c] = even[c] | (whole ? uint32_t(odd[c]) << 16 : 0u);
        }

        Task task;
        float* result = space + omp_get_thread_num() * room;  // [channels][QUERIES]
        uint32_t* packed = (uint32_t*)(result + int64_t(channels) * QUERIES);  // [depth_pairs][QUERIES]
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < batch * heads * tiles; ++number) {
            const int64_t tile = number % tiles, head = number / tiles % heads, b = number / tiles / heads;
            const int64_t key_head = head / (heads / key_heads), first_query = tile * QUERIES;
            const int here = int(std::min<int64_t>(QUERIES, queries - first_query));
            const uint16_t* from = query + b * of_query[0] + head * of_query[1] + first_query * of_query[2];
            const uint16_t* head_keys = key + b * of_key[0] + key_head * of_key[1];
            const uint32_t* head_values = interleaved + (b * key_heads + key_head) * key_pairs * channels;
            for (int q = 0; q < QUERIES; ++q)
                for (int p = 0; p < depth_pairs; ++p) {
                    uint32_t pair = 0;
                    if (q < here) std::memcpy(&pair, from + q * of_query[2] + 2 * p, sizeof pair);
                    packed[p * QUERIES + q] = pair;
                }
            std::fill(task.sum, task.sum + QUERIES, 0.0f);
            std::fill(task.largest, task.largest + QUERIES, -std::numeric_limits<float>::infinity());

            for (int64_t first_key = 0; first_key < keys; first_key += KEYS) {
                const int count = int(std::min<int64_t>(KEYS, keys - first_key));
                const uint16_t* block = head_keys + first_key * of_key[2];
                __m512 largest[VECTORS];
                for (int v = 0; v < VECTORS; ++v) largest[v] = _mm512_load_ps(task.largest + 16 * v);
                int k = 0;
                for (; k + ROWS <= count; k += ROWS)
                    score<ROWS>(block + k * of_key[2], of_key[2], packed, depth_pairs, task.scores + k, largest);
                for (; k < count; ++k)
                    score<1>(block + k * of_key[2], of_key[2], packed, depth_pairs, task.scores + k, largest);

                for (int v = 0; v < VECTORS; ++v) {
                    const __m512 factor = _mm512_set1_ps(to_exponent), before = _mm512_load_ps(task.largest + 16 * v);
                    // Where all scores so far are -inf, so that nothing is subtracted from them and they stay it.
                    const __mmask16 none = _mm512_cmp_ps_mask(largest[v], lowest, _CMP_EQ_OQ);
                    const __m512 shift = _mm512_maskz_mul_ps(_knot_mask16(none), largest[v], factor);
                    // Where the largest stays this is 1, so that earlier keys do not fade with the number of blocks.
                    const __m512 scaled = exp2_of<true>(_mm512_fmsub_ps(before, factor, shift));
                    __m512 sum = _mm512_mul_ps(_mm512_load_ps(task.sum + 16 * v), scaled);
                    if (first_key == 0) sum = _mm512_setzero_ps();
                    for (int key_row = 0; key_row < count; key_row += 2) {
                        const __m512 even = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(task.scores[key_row] + 16 * v), factor, shift));
                        const __m512 odd = key_row + 1 < count
                            ? exp2_of(_mm512_fmsub_ps(_mm512_load_ps(task.scores[key_row + 1] + 16 * v), factor, shift))
                            : _mm512_setzero_ps();
                        sum = _mm512_add_ps(sum, _mm512_add_ps(even, odd));
                        _mm512_store_si512(task.shares[key_row / 2] + 16 * v, paired(even, odd));
                    }
                    _mm512_store_ps(task.largest + 16 * v, largest[v]);
                    _mm512_store_ps(task.sum + 16 * v, sum);
                    _mm512_store_ps(task.scaled + 16 * v, scaled);
                }

                const uint32_t* block_values = head_values + first_key / 2 * channels;
                const int pairs = (count + 1) / 2;
                const bool first = first_key == 0;
                int c = 0;
                for (; c + ROWS <= channels; c += ROWS)
                    gather<ROWS>(block_values + c, channels, task.shares, pairs, task.scaled, first, result + c * QUERIES);
                if (channels - c == 4)
                    gather<4>(block_values + c, channels, task.shares, pairs, task.scaled, first, result + c * QUERIES);
                if (channels - c == 2)
                    gather<2>(block_values + c, channels, task.shares, pairs, task.scaled, first, result + c * QUERIES);
            }

            for (int v = 0; v < VECTORS; ++v)
                _mm512_store_ps(task.sum + 16 * v, _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_load_ps(task.sum + 16 * v)));
            uint16_t* to = out + b * of_out[0] + head * of_out[1] + first_query * of_out[2];
            for (int c = 0; c < channels; c += 2) {
                alignas(64) uint32_t pairs[QUERIES];
                for (int v = 0; v < VECTORS; ++v) {
                    const __m512 weight = _mm512_load_ps(task.sum + 16 * v);
                    const __m512 even = _mm512_mul_ps(_mm512_load_ps(result + c * QUERIES + 16 * v), weight);
                    const __m512 odd = _mm512_mul_ps(_mm512_load_ps(result + (c + 1) * QUERIES + 16 * v), weight);
                    _mm512_store_si512(pairs + 16 * v, paired(even, odd));
                }
                for (int q = 0; q < here; ++q) std::memcpy(to + q * of_out[2] + c, pairs + q, sizeof(uint32_t));
            }
        }
    }
    return 0;
}
