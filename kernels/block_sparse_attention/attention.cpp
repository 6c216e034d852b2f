// Attention to lists of key blocks, on x86-64, in the widest vectors that it is compiled for and DITOPT_LANES lets it use;
// bfloat16 needs AVX-512's dot products.
//
// One task is 64 queries of one head, and the longest lists are begun first. Within a task everything is held transposed,
// queries along the lanes: scores [key][query], the result [channel][query]. So maxima and sums over keys are plain
// vector operations, and keys and values are read as broadcast words. A word is what a product takes at once: one float,
// or a pair of bfloat16 numbers. Keys are read where they lie; bfloat16 values are interleaved once, rows 2j and 2j+1
// channel by channel, as a product over keys takes them in pairs.
//
// Neighbouring blocks of a list make a run, and a run is taken in chunks of at most CHUNK keys between two rescalings.
// Behind them come the means of groups of keys, where a head has a rest: all groups of a chunk are scored, and those that
// lie in listed blocks count as none. A chunk that a mask hides from all queries of a task is passed over.
//
// Heads with int8 scores (block_sparse_attention/int8.py) read keys that were quantised before, and quantise the queries of a
// task themselves; a word is then four numbers, and queries are shifted by 128, as the instruction takes one operand unsigned.
#if !defined(__x86_64__)
#error "this kernel is for x86-64"
#endif
#if !defined(__has_builtin)
#error "__builtin_shufflevector is needed: GCC 12 or Clang"
#elif !__has_builtin(__builtin_shufflevector)
#error "__builtin_shufflevector is needed: GCC 12 or Clang"
#endif

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <new>
#include <utility>
#include <vector>

namespace {

#ifndef DITOPT_LANES
#define DITOPT_LANES 16
#endif
#if defined(__AVX512F__) && DITOPT_LANES >= 16
#define DITOPT_AVX512
constexpr int LANES = 16, VECTORS = 4;  // 6 x 4 of 32 registers are sums
#elif defined(__AVX__) && DITOPT_LANES >= 8
#define DITOPT_AVX
constexpr int LANES = 8, VECTORS = 2;   // 6 x 2 of 16
#else
constexpr int LANES = 4, VECTORS = 2;
#endif
constexpr int TASK = 64;                 // queries
constexpr int STRIP = LANES * VECTORS;   // queries of a register tile
constexpr int STRIPS = TASK / STRIP;
constexpr int CHUNK = 96;                // keys
constexpr int ROWS = 6;                  // of a register tile

typedef float Floats __attribute__((vector_size(LANES * 4), may_alias));  // words are stored as either, read as either
typedef int32_t Ints __attribute__((vector_size(LANES * 4), may_alias));

template <class To, class From>
inline To bits(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &value, sizeof to);
    return to;
}

template <class V>
inline V load(const void* at) {
    return *(const V*)at;  // aligned
}

inline void store(void* at, Floats value) { *(Floats*)at = value; }
inline void store(void* at, Ints value) { *(Ints*)at = value; }

inline Floats all(float value) { return Floats{} + value; }

// The second where either is NaN: so NaN in a later score is kept, and one in an earlier score is in the sum already.
inline Floats larger(Floats one, Floats two) {
#if defined(DITOPT_AVX512)
    return (Floats)_mm512_max_ps((__m512)one, (__m512)two);
#elif defined(DITOPT_AVX)
    return (Floats)_mm256_max_ps((__m256)one, (__m256)two);
#else
    return one > two ? one : two;
#endif
}

// 2^x for x <= 0, by a polynomial of least relative error on [-1/2, 1/2]: 7.5e-5, or 9.1e-8 and exact for 0. NaN stays
// NaN, -inf gives 0.
template <int degree>
inline Floats exp2_of(Floats x) {
#if defined(DITOPT_AVX512)
    const Floats whole = (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const Floats magic = all(12582912.0f);  // 1.5 * 2^23: the sum's last bits are the nearest integer
    const Floats bounded = x < -126.0f ? all(-126.0f) : x;
    const Floats shifted = bounded + magic, whole = shifted - magic;
#endif
    const Floats part = x - whole;
    Floats power;
    if constexpr (degree == 3) {
        power = part * 0.05517166f + 0.24261113f;
        power = power * part + 0.69326097f;
        power = power * part + 0.99992806f;
    } else {
        power = part * 1.32647273e-3f + 9.67151299e-3f;
        power = power * part + 5.55073358e-2f;
        power = power * part + 2.40222424e-1f;
        power = power * part + 6.93147004e-1f;
        power = power * part + 1.0f;
    }
#if defined(DITOPT_AVX512)
    return (Floats)_mm512_scalef_ps((__m512)power, (__m512)whole);
#else
    const Floats scale = bits<Floats>((bits<Ints>(shifted) + 127) << 23);
    return x < -126.0f ? all(0.0f) : power * scale;
#endif
}

#if defined(DITOPT_AVX512) && defined(__AVX512VNNI__)
#define DITOPT_BYTES
#endif

// Products of float32: a word is a number.
struct Single {
    typedef float Element;
    static constexpr int PACKED = 1, DEGREE = 5;

    static float wide(float number) { return number; }

    static Floats add_product(Floats sum, Ints lanes, const void* word) {
        return sum + bits<Floats>(lanes) * *(const float*)word;
    }
};

#if defined(DITOPT_AVX512) && defined(__AVX512BF16__)
#define DITOPT_PAIRS
// Products of bfloat16 pairs, summed in float32.
struct Paired {
    typedef uint16_t Element;
    static constexpr int PACKED = 2, DEGREE = 3;

    static float wide(uint16_t number) { return bits<float>(uint32_t(number) << 16); }

    static Floats add_product(Floats sum, Ints lanes, const void* word) {
        int pair;
        std::memcpy(&pair, word, sizeof pair);  // keys may lie at odd numbers
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)lanes, (__m512bh)_mm512_set1_epi32(pair));
    }

    // Lane i holds (even[i], odd[i]), the even one in the lower half.
    static Ints join(Floats even, Floats odd) {
        const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                               23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        return (Ints)_mm512_permutexvar_epi16(order, halves);
    }

    static void interleave(const uint16_t* even, const uint16_t* odd, int channels, uint32_t* to) {
        int c = 0;
        for (; c + 16 <= channels; c += 16) {
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(even + c)));
            __m512i high = _mm512_setzero_si512();
            if (odd) high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(odd + c))), 16);
            _mm512_storeu_si512(to + c, _mm512_or_si512(low, high));
        }
        for (; c < channels; ++c) to[c] = even[c] | (odd ? uint32_t(odd[c]) << 16 : 0u);
    }
};
#endif

// One stage of a transposition: rows i and i + S exchange every second group of S lanes.
template <int S, bool SECOND, std::size_t... I>
inline Ints exchanged(Ints one, Ints two, std::index_sequence<I...>) {
    return __builtin_shufflevector(one, two, (int(I) / S % 2 == 0 ? int(I) + (SECOND ? S : 0)
                                                                  : LANES + int(I) - (SECOND ? 0 : S))...);
}

template <int S>
inline void exchange(Ints (&rows)[LANES]) {
    constexpr auto lanes = std::make_index_sequence<LANES>();
    for (int i = 0; i < LANES; ++i)
        if (i / S % 2 == 0) {
            const Ints one = rows[i], two = rows[i + S];
            rows[i] = exchanged<S, false>(one, two, lanes);
            rows[i + S] = exchanged<S, true>(one, two, lanes);
        }
    if constexpr (2 * S < LANES) exchange<2 * S>(rows);
}

// `high` x `wide` words at `from`, transposed at `to`; what is missing of LANES x LANES is not read and not written.
inline void transpose(const char* from, int64_t stride, int high, int wide, char* to, int64_t to_stride) {
    Ints rows[LANES];
    for (int i = 0; i < LANES; ++i) {
        rows[i] = Ints{};
        if (i < high) std::memcpy(&rows[i], from + i * stride, wide == LANES ? LANES * 4 : wide * 4);
    }
    exchange<1>(rows);
    for (int i = 0; i < LANES && i < wide; ++i)
        std::memcpy(to + i * to_stride, &rows[i], high == LANES ? LANES * 4 : high * 4);
}

constexpr int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct State {
    alignas(64) float scores[CHUNK][STRIP];
    alignas(64) int32_t shares[CHUNK][STRIP];  // softmax numerators, as words
    alignas(64) float largest[TASK], sum[TASK], scaled[STRIP];
};

// `rows` keys against a strip of queries; folds the scores into `largest`.
template <class F, int rows>
inline void score(const typename F::Element* keys, int64_t stride, const int32_t* queries, int words,
                  float (*scores)[STRIP], Floats (&largest)[VECTORS]) {
    Floats sums[rows][VECTORS] = {};
    for (int word = 0; word < words; ++word) {
        Ints lanes[VECTORS];
        for (int v = 0; v < VECTORS; ++v) lanes[v] = load<Ints>(queries + word * STRIP + LANES * v);
        for (int r = 0; r < rows; ++r)
            for (int v = 0; v < VECTORS; ++v)
                sums[r][v] = F::add_product(sums[r][v], lanes[v], keys + r * stride + word * F::PACKED);
    }
    for (int r = 0; r < rows; ++r)
        for (int v = 0; v < VECTORS; ++v) {
            store(scores[r] + LANES * v, sums[r][v]);
            largest[v] = larger(largest[v], sums[r][v]);
        }
}

constexpr int SHIFT = 128;       // of int8 queries
constexpr float LARGEST = 127.0f, SMALLEST = 1e-30f;

// A chunk of int8 keys: numbers of `stride` bytes a key, their sums times -SHIFT, and their scales.
struct Keys8 {
    const int8_t* numbers;
    const int32_t* shifted;
    const float* scales;
    int64_t stride;
};

// As `score`, of int8 keys from `first` on; `queries` are words of four and have `scales` of their own.
template <int rows>
inline void score8(const Keys8& keys, int first, const int32_t* queries, const float* scales, int words, float (*scores)[STRIP],
                   Floats (&largest)[VECTORS]) {
#if defined(DITOPT_BYTES)
    Ints sums[rows][VECTORS];
    for (int r = 0; r < rows; ++r)
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = Ints{} + keys.shifted[first + r];
    for (int word = 0; word < words; ++word) {
        Ints lanes[VECTORS];
        for (int v = 0; v < VECTORS; ++v) lanes[v] = load<Ints>(queries + word * STRIP + LANES * v);
        for (int r = 0; r < rows; ++r) {
            int32_t four;
            std::memcpy(&four, keys.numbers + (first + r) * keys.stride + 4 * word, sizeof four);
            for (int v = 0; v < VECTORS; ++v)
                sums[r][v] = (Ints)_mm512_dpbusd_epi32((__m512i)sums[r][v], (__m512i)lanes[v], _mm512_set1_epi32(four));
        }
    }
    for (int r = 0; r < rows; ++r)
        for (int v = 0; v < VECTORS; ++v) {
            const Floats products = (Floats)_mm512_cvtepi32_ps((__m512i)sums[r][v]);
            const Floats found = products * (load<Floats>(scales + LANES * v) * keys.scales[first + r]);
            store(scores[r] + LANES * v, found);
            largest[v] = larger(largest[v], found);
        }
#endif
}

// The largest of numbers that come a row at a time.
struct Largest {
    float tops[16] = {}, odd[16] = {};

    void take(const float* row, int64_t count) {
#if defined(DITOPT_BYTES)
        __m512 top = _mm512_loadu_ps(tops), wrong = _mm512_loadu_ps(odd);
        for (int64_t c = 0; c < count; c += 16) {
            const __m512 each = _mm512_maskz_loadu_ps(__mmask16(count - c < 16 ? (1 << (count - c)) - 1 : 0xffff), row + c);
            top = _mm512_max_ps(top, _mm512_abs_ps(each));
            wrong = _mm512_fmadd_ps(each, _mm512_setzero_ps(), wrong);  // NaN from a number on that is not finite
        }
        _mm512_storeu_ps(tops, top), _mm512_storeu_ps(odd, wrong);
#endif
    }
    // Over LARGEST; NaN where a number was not finite.
    float scale() const {
        float top = SMALLEST, wrong = 0.0f;
        for (int i = 0; i < 16; ++i) top = std::max(top, tops[i]), wrong += odd[i];
        return wrong == 0.0f ? top / LARGEST : std::numeric_limits<float>::quiet_NaN();
    }
};

// A row to int8, halves away from 0, as int8.py; `shift` is added. Nothing but that where the scale is no number.
template <class Byte>
inline void to_bytes(const float* row, int64_t count, float scale, int shift, Byte* to) {
    if (scale != scale) {
        std::fill(to, to + count, Byte(shift));
        return;
    }
#if defined(DITOPT_BYTES)
    const __m512 sign = _mm512_set1_ps(-0.0f), half = _mm512_set1_ps(0.5f);
    for (int64_t c = 0; c < count; c += 16) {
        const __mmask16 there = __mmask16(count - c < 16 ? (1 << (count - c)) - 1 : 0xffff);
        const __m512 share = _mm512_div_ps(_mm512_maskz_loadu_ps(there, row + c), _mm512_set1_ps(scale));
        const __m512 away = _mm512_castsi512_ps(_mm512_or_si512(
            _mm512_and_si512(_mm512_castps_si512(share), _mm512_castps_si512(sign)), _mm512_castps_si512(half)));
        const __m512i number = _mm512_add_epi32(_mm512_cvttps_epi32(_mm512_add_ps(share, away)), _mm512_set1_epi32(shift));
        _mm512_mask_cvtepi32_storeu_epi8(to + c, there, number);
    }
#endif
}

// `rows` channels of the result: what there is, scaled, and the values of `words` words of keys.
template <class F, int rows>
inline void gather(const int32_t* values, int64_t stride, const int32_t (*shares)[STRIP], int words,
                   const float* scaled, float* result) {
    Floats sums[rows][VECTORS];
    for (int r = 0; r < rows; ++r)
        for (int v = 0; v < VECTORS; ++v)
            sums[r][v] = load<Floats>(result + r * STRIP + LANES * v) * load<Floats>(scaled + LANES * v);
    for (int word = 0; word < words; ++word) {
        Ints lanes[VECTORS];
        for (int v = 0; v < VECTORS; ++v) lanes[v] = load<Ints>(shares[word] + LANES * v);
        for (int r = 0; r < rows; ++r)
            for (int v = 0; v < VECTORS; ++v)
                sums[r][v] = F::add_product(sums[r][v], lanes[v], values + word * stride + r);
    }
    for (int r = 0; r < rows; ++r)
        for (int v = 0; v < VECTORS; ++v) store(result + r * STRIP + LANES * v, sums[r][v]);
}

// Calls `tile<rows>(at)` until `count` rows are done, ROWS at a time and then the rest at once.
template <class Tile>
inline void in_tiles(int count, Tile tile) {
    int at = 0;
    for (; at + ROWS <= count; at += ROWS) tile(std::integral_constant<int, ROWS>(), at);
    switch (count - at) {
        case 5: tile(std::integral_constant<int, 5>(), at); break;
        case 4: tile(std::integral_constant<int, 4>(), at); break;
        case 3: tile(std::integral_constant<int, 3>(), at); break;
        case 2: tile(std::integral_constant<int, 2>(), at); break;
        case 1: tile(std::integral_constant<int, 1>(), at); break;
    }
}

// Numerators of `count` scores a query, their sum and what earlier results are scaled by.
template <class F>
inline void softmax(State& state, float* sums, float* most, const Floats (&largest)[VECTORS], int count, float factor) {
    const float lowest = -std::numeric_limits<float>::infinity();
    for (int v = 0; v < VECTORS; ++v) {
        const Floats before = load<Floats>(most + LANES * v);
        // Where all scores so far are -inf nothing is subtracted from them, so that they stay it.
        const Floats shift = largest[v] == lowest ? all(0.0f) : largest[v] * factor;
        // Where the largest stays this is 1, so that earlier keys do not fade with the number of chunks.
        const Floats scaled = exp2_of<5>(before * factor - shift);
        Floats sum = load<Floats>(sums + LANES * v) * scaled;
        const auto share = [&](int row) {
            return exp2_of<F::DEGREE>(load<Floats>(state.scores[row] + LANES * v) * factor - shift);
        };
        for (int row = 0; row < count; row += F::PACKED) {
            Floats one = share(row);
            if constexpr (F::PACKED == 1) {
                store(state.shares[row] + LANES * v, one);
            } else {
                Floats two = row + 1 < count ? share(row + 1) : Floats{};
                store(state.shares[row / 2] + LANES * v, F::join(one, two));
                one += two;
            }
            sum += one;
        }
        store(most + LANES * v, largest[v]);
        store(sums + LANES * v, sum);
        store(state.scaled + LANES * v, scaled);
    }
}

// Scores of groups of keys: each counts as often as it has tokens, of which `bias` has the logarithm over the scale; -inf
// leaves one out, whatever its score.
inline void weigh(float (*scores)[STRIP], const float* bias, int count, Floats (&largest)[VECTORS]) {
    const float lowest = -std::numeric_limits<float>::infinity();
    for (int row = 0; row < count; ++row)
        for (int v = 0; v < VECTORS; ++v) {
            const Floats found = bias[row] == lowest ? all(lowest) : load<Floats>(scores[row] + LANES * v) + bias[row];
            store(scores[row] + LANES * v, found);
            largest[v] = larger(largest[v], found);
        }
}

// Scores under a mask: `bias` [count][TASK] of a strip's queries, as in the one above.
inline void weigh_each(float (*scores)[STRIP], const float (*bias)[TASK], int first, int count, Floats (&largest)[VECTORS]) {
    const float lowest = -std::numeric_limits<float>::infinity();
    for (int row = 0; row < count; ++row)
        for (int v = 0; v < VECTORS; ++v) {
            const Floats own = load<Floats>(bias[row] + first + LANES * v);
            const Floats found = own == lowest ? own : load<Floats>(scores[row] + LANES * v) + own;
            store(scores[row] + LANES * v, found);
            largest[v] = larger(largest[v], found);
        }
}

// A task's queries, and what it has of the result so far.
struct Task {
    const int32_t* queries;  // [STRIPS][words][STRIP]
    float* result;           // [STRIPS][channels][STRIP]
    int here, words, channels;
    float factor;
    const int32_t* queries8;  // [STRIPS][words8][STRIP], of heads with int8 scores
    const float* scales8;     // [TASK]
    int words8;
};

// Takes `count` keys, at most CHUNK, and their values into a task's result; `bias` as in `weigh`, or null, and `masked` as
// in `weigh_each`, or null; `eight`: the keys as int8, which are scored in their place, or null.
template <class F>
__attribute__((noinline)) void take(State& state, const Task& task, const typename F::Element* keys, int64_t key_stride,
                                    const int32_t* values, int64_t value_stride, int count, const float* bias,
                                    const float (*masked)[TASK] = nullptr, const Keys8* eight = nullptr) {
    for (int strip = 0; strip * STRIP < task.here; ++strip) {
        float* most = state.largest + strip * STRIP;
        Floats largest[VECTORS], unweighed[VECTORS];
        for (int v = 0; v < VECTORS; ++v) unweighed[v] = largest[v] = load<Floats>(most + LANES * v);
        if (eight) in_tiles(count, [&](auto rows, int k) {
            score8<rows()>(*eight, k, task.queries8 + strip * int64_t(task.words8) * STRIP, task.scales8 + strip * STRIP,
                           task.words8, state.scores + k, bias || masked ? unweighed : largest);
        });
        else in_tiles(count, [&](auto rows, int k) {
            score<F, rows()>(keys + k * key_stride, key_stride, task.queries + strip * int64_t(task.words) * STRIP,
                             task.words, state.scores + k, bias || masked ? unweighed : largest);
        });
        if (bias) weigh(state.scores, bias, count, largest);
        if (masked) weigh_each(state.scores, masked, strip * STRIP, count, largest);
        softmax<F>(state, state.sum + strip * STRIP, most, largest, count, task.factor);
        in_tiles(task.channels, [&](auto rows, int c) {
            gather<F, rows()>(values + c, value_stride, state.shares, int((count + F::PACKED - 1) / F::PACKED), state.scaled,
                              task.result + (strip * int64_t(task.channels) + c) * STRIP);
        });
    }
}

struct Sizes {
    int64_t batch, heads, key_heads, queries, keys, depth, channels, list_batch, width, query_block, key_block;
    int64_t groups, pool;  // of pooled keys and their tokens; no groups where no head has a rest
};

// Keys and values of all heads: where rows of a head begin, as `F` reads them.
template <class F>
struct Rows {
    typedef typename F::Element Element;
    const Element *key, *value;
    const int64_t *of_key, *of_value;  // strides of batch, head, row
    int64_t count, channels, heads;
    int32_t* interleaved;  // the values in pairs, where those are read

    int64_t words() const { return (count + F::PACKED - 1) / F::PACKED; }
    const Element* keys(int64_t b, int64_t head) const { return key + b * of_key[0] + head * of_key[1]; }
    const int32_t* values(int64_t b, int64_t head) const {
        if constexpr (F::PACKED == 2) return interleaved + (b * heads + head) * words() * channels;
        return (const int32_t*)(value + b * of_value[0] + head * of_value[1]);
    }
    int64_t value_stride() const { return F::PACKED == 2 ? channels : of_value[2]; }

    // Fills row `number` of all heads' `interleaved`.
    void interleave(int64_t number) const {
        if constexpr (F::PACKED == 2) {
            const int64_t word = number % words(), head = number / words() % heads, b = number / words() / heads;
            const Element* even = value + b * of_value[0] + head * of_value[1] + 2 * word * of_value[2];
            F::interleave(even, 2 * word + 1 < count ? even + of_value[2] : nullptr, int(channels),
                          (uint32_t*)interleaved + number * channels);
        }
    }
};

// What heads with int8 scores read; `heads` is null where there are none. Filled by `quantise`, but for `mean`.
struct Int8 {
    const int32_t* heads;  // [H]: not 0 for these
    const float* mean;     // [B, Hkv, D]: what is subtracted from keys
    int8_t* numbers;       // [B, Hkv, L, 4 * words]
    int32_t* shifted;      // [B, Hkv, L]
    float* scales;         // [B, Hkv, L]

    bool of(int64_t head) const { return heads && heads[head] != 0; }
};

inline int64_t blocks(int64_t tokens, int64_t block) { return (tokens + block - 1) / block; }

inline int64_t words8(const Sizes& s) { return (s.depth + 3) / 4; }

// A block of keys of a head, number `number` of all; `room` has one for a key.
template <class F>
void quantise(const Int8& to, const Rows<F>& keys, const Sizes& s, int64_t number, float* room) {
    const int64_t key_blocks = blocks(s.keys, s.key_block), row = number / key_blocks, head = row % s.key_heads;
    const int64_t group = s.heads / s.key_heads, stride = 4 * words8(s);
    if (std::none_of(to.heads + head * group, to.heads + (head + 1) * group, [](int32_t each) { return each != 0; })) return;
    const int64_t first = number % key_blocks * s.key_block, end = std::min(s.keys, first + s.key_block);
    const auto* from = keys.keys(row / s.key_heads, head);
    const float* mean = to.mean + row * s.depth;
    const auto smooth = [&](int64_t key) {  // the row without the mean, and zeros behind it
        for (int64_t c = 0; c < s.depth; ++c) room[c] = F::wide(from[key * keys.of_key[2] + c]) - mean[c];
        return room;
    };
    std::fill(room + s.depth, room + stride, 0.0f);
    Largest largest;
    for (int64_t key = first; key < end; ++key) largest.take(smooth(key), s.depth);
    const float scale = largest.scale();
    for (int64_t key = first; key < end; ++key) {
        int8_t* numbers = to.numbers + (row * s.keys + key) * stride;
        to_bytes(smooth(key), stride, scale, 0, numbers);
        int32_t total = 0;
        for (int64_t c = 0; c < stride; ++c) total += numbers[c];
        to.shifted[row * s.keys + key] = -SHIFT * total;
        to.scales[row * s.keys + key] = scale;
    }
}

// What a mask adds to scores, as float32; `strides` of batch, head, query and key, 0 where one is for all.
struct Mask {
    const float* data;
    const int64_t* strides;

    bool of_queries() const { return strides[2] != 0; }
    const float* at(int64_t b, int64_t head, int64_t query) const {
        return data + b * strides[0] + head * strides[1] + query * strides[2];
    }
};

constexpr float ALIKE = -0x1p119f;
constexpr double ALIKE_LEVEL = -0x1p33;

// In units of a score that is not scaled yet. Below -2^30 float32 has no digits left for scores, so such keys are alike; what
// they become is far from overflow, and times a factor is exact: a row of nothing else has equal shares, as in dense attention.
inline float bias_of(float added, float scale) {
    return std::isfinite(added) && added < -0x1p30f * scale ? ALIKE : added / scale;
}

// The logarithm of a query's sum from its largest score and the sum over that, `shift` as `softmax` has it: what a product's
// rounding adds to one it takes from the other. A row of nothing but keys that are alike is said to be at ALIKE_LEVEL, below all
// others and where float64 has digits for their number (block_sparse_attention/masks.py).
inline double log_of(float most, float sum, float factor, float scale) {
    if (std::isinf(most)) return most;
    if (most < ALIKE / 2) return ALIKE_LEVEL * std::max(1.0f, scale) + std::log(double(sum));
    const float shift = most * factor;
    return (double(shift) + std::log2(double(sum))) / 1.44269504088896340736;
}

// What a mask adds to the scores of a chunk: [key][query], or in the first row where it is the same for all queries.
struct alignas(64) Hidden { float rows[CHUNK][TASK]; };

// Memory that a thread works in, one after the other: all of it begins at lines of 64 bytes.
struct Space {
    int64_t packed, result, bias, hidden, queries8, scales8, shift8, row8, wide8, all;  // where they begin behind `State`; all bytes

    Space(const Sizes& s, int packed_in_a_word, bool masked, bool int8) {
        packed = whole_lines(sizeof(State));
        result = packed + s.depth / packed_in_a_word * TASK * 4;
        bias = result + s.channels * TASK * 4;
        hidden = bias + whole_lines(s.groups * 4);
        queries8 = hidden + (masked ? sizeof(Hidden) : 0);
        scales8 = queries8 + (int8 ? words8(s) * TASK * 4 : 0);
        shift8 = scales8 + (int8 ? TASK * 4 : 0);
        row8 = shift8 + (int8 ? TASK * 4 : 0);
        wide8 = row8 + (int8 ? words8(s) * TASK * 4 : 0);
        all = wide8 + (int8 ? whole_lines(words8(s) * 16) : 0);
    }
};

// A list; one that counts as many as there are key blocks is all of them, and its entries are not read.
struct List {
    const int32_t* entries;
    int64_t count;
    bool all;

    List(const Sizes& s, const int32_t* indices, const int32_t* counts, int64_t row)
        : entries(indices + row * s.width), count(counts[row]), all(count == blocks(s.keys, s.key_block)) {}
    int64_t operator[](int64_t at) const { return all ? at : entries[at]; }
};

// The first list that is wrong, as {row, what, value}: what is 1 for a count, 2 for an index; row -1 if none is.
void check(const Sizes& s, const int32_t* indices, const int32_t* counts, int64_t* wrong) {
    const int64_t rows = s.list_batch * s.heads * blocks(s.queries, s.query_block);
    const int64_t key_blocks = blocks(s.keys, s.key_block);
    wrong[0] = -1;
    for (int64_t row = 0; row < rows; ++row) {
        const List list(s, indices, counts, row);
        if (list.all) continue;
        if (list.count < 0 || list.count > s.width) {
            wrong[0] = row, wrong[1] = 1, wrong[2] = list.count;
            return;
        }
        int64_t before = -1;
        for (int64_t i = 0; i < list.count; ++i) {
            const int64_t index = list[i];
            if (index <= before || index >= key_blocks) {
                wrong[0] = row, wrong[1] = 2, wrong[2] = index;
                return;
            }
            before = index;
        }
    }
}

template <class F>
void attend(const typename F::Element* query, const Rows<F>& all_keys, const Rows<F>& pooled, const int32_t* rest,
            const Mask& mask, typename F::Element* out, void* lse, float* kept, const int32_t* indices,
            const int32_t* counts, const Int8& int8, const Sizes& s, const int64_t* of_query, const int64_t* of_out, float scale,
            int threads, char* memory) {
    typedef typename F::Element Element;
    const int words = int(s.depth / F::PACKED), channels = int(s.channels), out_words = channels / F::PACKED;
    const int64_t tiles = blocks(s.queries, TASK), query_blocks = blocks(s.queries, s.query_block);
    const int64_t tasks = s.batch * s.heads * tiles;
    const float factor = scale * 1.44269504088896f, lowest = -std::numeric_limits<float>::infinity();

    const auto list_of = [&](int64_t task) {
        const int64_t tile = task % tiles, head = task / tiles % s.heads, b = task / tiles / s.heads;
        return ((s.list_batch > 1 ? b : 0) * s.heads + head) * query_blocks + tile * TASK / s.query_block;
    };
    const auto has_rest = [&](int64_t head) { return s.groups > 0 && rest[head] != 0; };
    const auto work_of = [&](int64_t task) {
        return counts[list_of(task)] * s.key_block + (has_rest(task / tiles % s.heads) ? s.groups : 0);
    };
    std::vector<int64_t> order(tasks);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return work_of(a) > work_of(b); });

#pragma omp parallel num_threads(threads)
    {
        if constexpr (F::PACKED == 2)
            for (const Rows<F>* rows : {&all_keys, &pooled}) {
#pragma omp for schedule(static)
                for (int64_t row = 0; row < s.batch * s.key_heads * rows->words(); ++row) rows->interleave(row);
            }

        const Space space(s, F::PACKED, mask.data != nullptr, int8.heads != nullptr);
        char* own = memory + omp_get_thread_num() * space.all;
        if (int8.heads) {
#pragma omp for schedule(static)
            for (int64_t block = 0; block < s.batch * s.key_heads * blocks(s.keys, s.key_block); ++block)
                quantise(int8, all_keys, s, block, (float*)(own + space.wide8));
        }
        auto* state = new (own) State;
        auto* packed = (int32_t*)(own + space.packed);  // [STRIPS][words][STRIP]
        auto* result = (float*)(own + space.result);    // [STRIPS][channels][STRIP]
        auto* bias = (float*)(own + space.bias);        // [groups]
        auto* hidden = mask.data ? new (own + space.hidden) Hidden : nullptr;
        const int64_t room = (int64_t(words) + channels) * TASK;
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < tasks; ++number) {
            const int64_t task = order[number], list = list_of(task);
            const int64_t tile = task % tiles, head = task / tiles % s.heads, b = task / tiles / s.heads;
            const int64_t key_head = head / (s.heads / s.key_heads), first_query = tile * TASK;
            const int here = int(std::min<int64_t>(TASK, s.queries - first_query));
            const Element* from = query + b * of_query[0] + head * of_query[1] + first_query * of_query[2];
            std::memset(packed, 0, room * 4);
            for (int q = 0; q < here; q += LANES)
                for (int w = 0; w < words; w += LANES)
                    transpose((const char*)(from + q * of_query[2]) + 4 * w, of_query[2] * int64_t(sizeof(Element)),
                              std::min(LANES, here - q), std::min(LANES, words - w),
                              (char*)(packed + (q / STRIP * int64_t(words) + w) * STRIP + q % STRIP), STRIP * 4);
            std::fill(state->sum, state->sum + TASK, 0.0f);
            std::fill(state->largest, state->largest + TASK, lowest);

            auto* queries8 = (int32_t*)(own + space.queries8);
            auto *scales8 = (float*)(own + space.scales8), *shift8 = (float*)(own + space.shift8);
            const Task taken{packed, result, here, words, channels, factor, queries8, scales8, int(words8(s))};
            const int64_t row_of_keys = b * s.key_heads + key_head;
            if (int8.of(head)) {
                auto* row8 = (uint8_t*)(own + space.row8);  // [TASK][4 * words8]
                auto* wide = (float*)(own + space.wide8);
                const int bytes = 4 * taken.words8;
                std::fill(wide + s.depth, wide + bytes, 0.0f);
                for (int q = 0; q < TASK; ++q) {
                    const Element* row = from + (q < here ? q : 0) * of_query[2];
                    Largest largest;
                    for (int64_t c = 0; c < s.depth; ++c) wide[c] = F::wide(row[c]);
                    largest.take(wide, s.depth);
                    scales8[q] = largest.scale();
                    shift8[q] = std::inner_product(wide, wide + s.depth, int8.mean + row_of_keys * s.depth, 0.0f);
                    to_bytes(wide, bytes, scales8[q], SHIFT, row8 + q * bytes);
                }
                for (int q = 0; q < TASK; q += LANES)
                    for (int w = 0; w < taken.words8; w += LANES)
                        transpose((const char*)(row8 + q * bytes) + 4 * w, bytes, LANES, std::min(LANES, taken.words8 - w),
                                  (char*)(queries8 + (q / STRIP * int64_t(taken.words8) + w) * STRIP + q % STRIP), STRIP * 4);
            }
            // Fills `hidden` for `count` keys from `first` on, in its first row where one bias is for all queries; whether
            // anything is left of them.
            const auto unmasked = [&](int64_t first, int count) {
                bool found = false;
                for (int q = 0; q < (mask.of_queries() ? here : 1); ++q) {
                    const float* from = mask.at(b, head, first_query + q) + first * mask.strides[3];
                    for (int k = 0; k < count; ++k) {
                        const float each = bias_of(from[k * mask.strides[3]], scale);
                        (mask.of_queries() ? hidden->rows[k][q] : hidden->rows[0][k]) = each;
                        found |= each != lowest;
                    }
                }
                for (int k = 0; mask.of_queries() && k < count; ++k)
                    std::fill(hidden->rows[k] + here, hidden->rows[k] + TASK, 0.0f);
                return found;
            };
            // Takes rows from `begin` to `end` in chunks of equal size, but for the last.
            const auto in_chunks = [&](const Rows<F>& rows, int64_t begin, int64_t end, const float* of_groups) {
                const Element* keys = rows.keys(b, key_head);
                const int32_t* values = rows.values(b, key_head);
                const int64_t chunks = blocks(end - begin, CHUNK), even = (blocks(end - begin, chunks) + 1) / 2 * 2;
                for (int64_t first = begin; first < end; first += even) {
                    const int count = int(std::min(even, end - first));
                    const float* of_chunk = of_groups ? of_groups + first : nullptr;
                    const float(*of_each)[TASK] = nullptr;
                    if (hidden && !of_groups) {
                        if (!unmasked(first, count)) continue;
                        if (mask.of_queries())
                            of_each = hidden->rows;
                        else
                            of_chunk = hidden->rows[0];
                    }
                    if (of_chunk && std::all_of(of_chunk, of_chunk + count, [=](float each) { return each == lowest; })) continue;
                    const int64_t key = row_of_keys * s.keys + first, stride = 4 * words8(s);
                    const Keys8 eight{int8.numbers + key * stride, int8.shifted + key, int8.scales + key, stride};
                    take<F>(*state, taken, keys + first * rows.of_key[2], rows.of_key[2],
                            values + first / F::PACKED * rows.value_stride(), rows.value_stride(), count, of_chunk, of_each,
                            int8.of(head) && !of_groups ? &eight : nullptr);
                }
            };
            const List listed(s, indices, counts, list);
            for (int64_t at = 0; at < listed.count;) {
                int64_t next = at + 1;
                while (next < listed.count && listed[next] == listed[next - 1] + 1) ++next;
                in_chunks(all_keys, listed[at] * s.key_block, std::min<int64_t>(s.keys, (listed[next - 1] + 1) * s.key_block), nullptr);
                at = next;
            }
            for (int q = 0; int8.of(head) && q < TASK; ++q) state->largest[q] += shift8[q];  // of keys as they are, again
            const auto write_logs = [&](auto* to, bool attended) {
                to += (b * s.heads + head) * s.queries + first_query;
                for (int q = 0; q < here; ++q) to[q] = attended ? log_of(state->largest[q], state->sum[q], factor, scale) : lowest;
            };
            if (has_rest(head)) {
                if (kept) write_logs(kept, counts[list] > 0);
                std::fill(bias, bias + s.groups, std::log(float(s.pool)) / scale);
                bias[s.groups - 1] = std::log(float(s.keys - (s.groups - 1) * s.pool)) / scale;
                const int64_t each = s.key_block / s.pool;
                for (int64_t at = 0; at < listed.count; ++at)
                    std::fill(bias + listed[at] * each, bias + std::min((listed[at] + 1) * each, s.groups), lowest);
                in_chunks(pooled, 0, s.groups, bias);
            }
            const bool attended = counts[list] > 0 || has_rest(head);
            mask.data ? write_logs((double*)lse, attended) : write_logs((float*)lse, attended);
            Element* to = out + b * of_out[0] + head * of_out[1] + first_query * of_out[2];
            for (int strip = 0; strip * STRIP < here; ++strip) {
                float* made = result + strip * int64_t(channels) * STRIP;
                for (int v = 0; v < VECTORS; ++v) {
                    const int q = strip * STRIP + LANES * v;
                    if (q >= here) break;
                    const Floats sum = load<Floats>(state->sum + q);
                    const Floats shown = mask.data ? (sum == 0.0f ? all(0.0f) : 1.0f / sum) : 1.0f / sum;
                    const Floats weight = attended ? shown : all(0.0f);
                    for (int w = 0; w < out_words; w += LANES) {
                        alignas(64) int32_t tile_words[LANES][LANES];
                        const int wide = std::min(LANES, out_words - w);
                        for (int i = 0; i < wide; ++i) {
                            const float* row = made + (w + i) * F::PACKED * STRIP + LANES * v;
                            if constexpr (F::PACKED == 1)
                                store(tile_words[i], load<Floats>(row) * weight);
                            else
                                store(tile_words[i], F::join(load<Floats>(row) * weight, load<Floats>(row + STRIP) * weight));
                        }
                        transpose((const char*)tile_words, LANES * 4, wide, std::min(LANES, here - q),
                                  (char*)(to + q * of_out[2]) + 4 * w, of_out[2] * int64_t(sizeof(Element)));
                    }
                }
            }
        }
    }
}

}  // namespace

// How many floats a vector has.
extern "C" int ditopt_lanes() { return LANES; }

// Whether there is a kernel for products of bfloat16 pairs.
extern "C" int ditopt_pairs() {
#if defined(DITOPT_PAIRS)
    return 1;
#else
    return 0;
#endif
}

// Whether there is one for int8 scores.
extern "C" int ditopt_bytes() {
#if defined(DITOPT_BYTES)
    return 1;
#else
    return 0;
#endif
}

// Bytes that a thread works in, for elements of so many bytes, with a mask or without, with int8 scores or without.
extern "C" int64_t ditopt_space(const int64_t* sizes, int element_bytes, int masked, int int8) {
    Sizes s;
    std::memcpy(&s, sizes, sizeof s);
    return Space(s, element_bytes == 4 ? 1 : 2, masked != 0, int8 != 0).all;
}

// Sizes as in `Sizes`. Strides, in elements: of query, key, value, result, pooled keys and pooled values each batch, head,
// row; the last dimension is dense; then those of the mask, as in `Mask`, which may be null. `lse` is [batch, heads,
// queries], of float64 under a mask, else of float32; so is `kept`, of float32, of listed keys alone, written for heads with a rest, or null. `rest` [heads] says which heads
// have one, and is not read where there are no groups. `interleaved` and `pooled_interleaved` have room for the values in
// bfloat16, and are not read otherwise; `memory` has `ditopt_space` bytes for each thread, and begins at a line of 64. What
// begins with int8 is as in `Int8`. Returns 0; 1 if a list is wrong (`wrong` says which), 2 if no kernel for the element was
// compiled, 3 if memory is short.
extern "C" int ditopt_block_sparse_attention(const void* query, const void* key, const void* value, void* out, void* lse,
                                             float* kept, const int32_t* indices, const int32_t* counts, int32_t* interleaved,
                                             const void* pooled_key, const void* pooled_value, const int32_t* rest,
                                             int32_t* pooled_interleaved, const float* mask, char* memory,
                                             const int32_t* int8_heads, const float* int8_mean, int8_t* int8_numbers,
                                             int32_t* int8_shifted, float* int8_scales, const int64_t* sizes,
                                             const int64_t* strides, float scale, int element_bytes, int threads,
                                             int64_t* wrong) {
    Sizes s;
    std::memcpy(&s, sizes, sizeof s);
    check(s, indices, counts, wrong);
    if (wrong[0] >= 0) return 1;
    const auto run = [&](auto form) -> int {
        typedef decltype(form) F;
        typedef typename F::Element Element;
        const Rows<F> all_keys{(const Element*)key, (const Element*)value, strides + 3, strides + 6,
                               s.keys, s.channels, s.key_heads, interleaved};
        const Rows<F> pooled{(const Element*)pooled_key, (const Element*)pooled_value, strides + 12, strides + 15,
                             s.groups, s.channels, s.key_heads, pooled_interleaved};
        try {
            attend<F>((const Element*)query, all_keys, pooled, rest, Mask{mask, strides + 18}, (Element*)out, lse, kept, indices,
                      counts, Int8{int8_heads, int8_mean, int8_numbers, int8_shifted, int8_scales}, s, strides, strides + 9, scale,
                      threads, memory);
        } catch (const std::bad_alloc&) {  // of the order of tasks, before any thread is started
            return 3;
        }
        return 0;
    };
    if (element_bytes == 4) return run(Single());
#if defined(DITOPT_PAIRS)
    return run(Paired());
#else
    return 2;
#endif
}
