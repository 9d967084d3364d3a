// One decoding step on a CPU: few tokens (N = B * T rows) through all blocks and the last projection, in one call.
//
// The step is a list of stages: five for each layer, then the logits. A stage is cut into chunks, which threads claim
// from one counter. Whoever finishes a stage's last chunk makes what lies between two stages (norms, RoPE, the cache)
// and opens the next one. So nobody waits for a thread that holds no chunk: where the system takes one away, since
// another program wants its core, the others go on.
//
// Who sees whom is not decided here: `Seen` brings the masks that the model made. Activations are float32.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

extern "C" {  // the same structs, field by field, as in cpu_decode.py
struct Linear {  // format: 0 float32, 1 bfloat16, 2 int8 with a scale for each row, 3 int4 in groups
  const void* weight;
  const void* scale;
  const float* bias;
  int64_t out, in, format, group;
};
struct Norm {  // kind: 0 none, 1 RMSNorm, 2 LayerNorm
  const float *weight, *bias;  // null: none
  double eps;
  int64_t size, kind;
};
struct Layer {
  Norm norm_1, norm_q, norm_k, post_attention, norm_2, post_mlp;
  Linear qkv, proj, fc_1, fc_2, out;  // fc_2.out is 0 where the MLP has no gate
  int64_t kind;
};
struct Model {
  int64_t layers, heads, groups, head_size, embd, rotated, activation, parallel;
  double scale, score_cap, logit_cap, residual, logit_scale;  // a cap of 0: none; residual: of what a block adds
  const Layer* layer;
  Norm ln_f;
  Linear head;
};
struct Seen {  // in slots first .. first + count - 1: what a part's queries see, mask[b * B + t * T + slot]; null: all
  int64_t part, first, count;
  const uint8_t* mask;
  int64_t b, t;
};
struct Angles {  // cos and sin for row (b, t) at b * B + t * T
  const float *cos, *sin;
  int64_t b, t;
};
struct Kind {  // what layers of one kind share in a call
  int64_t parts, seen_count;
  const Seen* seen;
  const Angles* queries;  // of each part
  Angles keys;            // of the call's own keys; with rotate_read of the slots read, `rotated` numbers each
  int64_t rotate_read;
  const float* temperature;  // of each row, or null
  int64_t copies;
  const int64_t* slots;  // (copies, N): where each row's key goes; -1: nowhere
  int64_t cache_slots, cache_bfloat16;
};
struct Call {
  int64_t threads, batch, tokens;
  float *x, *logits;  // (N, C), which changes, and (N, V)
  int64_t kinds;
  const Kind* kind;
  void* const* caches;  // k and v, (B, G, slots, D), of every layer
};
}

namespace {

// ------------------------------------------------------------------------------------------------------------- vectors

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int RUN = 32, WORDS = 4;  // int4: a run of 32 inputs lies in 4 words; nibble j of word i holds input 4 j + i
typedef float Floats __attribute__((vector_size(W * 4)));
typedef int32_t Ints __attribute__((vector_size(W * 4)));
typedef uint32_t Words __attribute__((vector_size(W * 4)));
struct bfloat16 {
  uint16_t bits;
};

template <class T>
struct Lines {  // allocates at the start of a cache line, so that no vector lies across two
  using value_type = T;
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const Lines&) const { return true; }
  bool operator!=(const Lines&) const { return false; }
};
using Buffer = std::vector<float, Lines<float>>;

template <class V>
inline V read(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
inline Floats load(const float* p) { return read<Floats>(p); }
#if defined(__AVX512F__)
inline Words widen(const uint16_t* p) { return (Words)_mm512_cvtepu16_epi32(read<__m256i>(p)); }
inline Ints widen(const int8_t* p) { return (Ints)_mm512_cvtepi8_epi32(read<__m128i>(p)); }
#elif defined(__AVX2__)
inline Words widen(const uint16_t* p) { return (Words)_mm256_cvtepu16_epi32(read<__m128i>(p)); }
inline Ints widen(const int8_t* p) { return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
#else
inline Words widen(const uint16_t* p) { return Words{p[0], p[1], p[2], p[3]}; }
inline Ints widen(const int8_t* p) { return Ints{p[0], p[1], p[2], p[3]}; }
#endif
inline Floats load(const bfloat16* p) { return (Floats)(widen(&p->bits) << 16); }
inline Floats load(const int8_t* p) { return __builtin_convertvector(widen(p), Floats); }
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof(v)); }

inline float number(float x) { return x; }
inline float number(int8_t x) { return x; }
inline float number(bfloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  return read<float>(&bits);
}
inline void put(float* p, float x) { *p = x; }
inline void put(bfloat16* p, float x) {  // to the nearest, ties to even; NaN stays NaN
  uint32_t bits = read<uint32_t>(&x);
  p->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float sum(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s[W];
  std::memcpy(s, &v, sizeof(v));
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) s[i] += s[i + half];
  return s[0];
#endif
}

inline float exponential(float x) {  // e^x to 2e-7, from operations that compilers vectorise
  x = std::min(std::max(x, -87.0f), 88.0f);
  float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691e-4f;
  for (float c : {1.3981999e-3f, 8.3334519e-3f, 4.1665796e-2f, 1.6666665e-1f, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  int32_t bits = (int32_t(n) + 127) << 23;
  return p * read<float>(&bits);
}

// ------------------------------------------------------------------------------------------------------------ products

constexpr int64_t AHEAD = 2048;  // bytes that are asked for before they are needed

// The products of n weights with K vectors, which lie `stride` apart.
template <int K, class T>
inline void dots(const T* w, const float* x, int64_t stride, int64_t n, float* out) {
  Floats a[K] = {}, b[K] = {};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    for (size_t line = 0; line < 2 * W * sizeof(T); line += 64)  // read once, so no cache need keep it
      __builtin_prefetch(reinterpret_cast<const char*>(w + i) + AHEAD + line, 0, 0);
    Floats w0 = load(w + i), w1 = load(w + i + W);
    for (int k = 0; k < K; k++) {
      a[k] += w0 * load(x + k * stride + i);
      b[k] += w1 * load(x + k * stride + i + W);
    }
  }
  for (int k = 0; k < K; k++) {
    out[k] = sum(a[k] + b[k]);
    for (int64_t j = i; j < n; j++) out[k] += number(w[j]) * x[k * stride + j];
  }
}

template <class F>
inline void by_fours(int64_t count, F&& f) {  // f(first, how many, as a constant)
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) f(i, std::integral_constant<int, 4>());
  if (count - i == 3) f(i, std::integral_constant<int, 3>());
  if (count - i == 2) f(i, std::integral_constant<int, 2>());
  if (count - i == 1) f(i, std::integral_constant<int, 1>());
}

struct Input {  // vectors (N, size) that a product reads
  Buffer plain, ordered, sums;  // for int4: in the order of the words' nibbles, and sums over nibbles
  int64_t words = 0;                        // words of a row, padded to whole vectors

  void order(int64_t rows, int64_t size) {
    words = (size / RUN * WORDS + W - 1) / W * W;
    ordered.assign(rows * words * 8, 0.0f);
    sums.assign(rows * words, 0.0f);
    for (int64_t n = 0; n < rows; n++)
      for (int64_t run = 0; run < size / RUN; run++)
        for (int64_t nibble = 0; nibble < 8; nibble++)
          for (int64_t i = 0; i < WORDS; i++) {
            int64_t word = n * words + run * WORDS + i;
            float value = plain[n * size + run * RUN + nibble * WORDS + i];
            ordered[(word / W * 8 + nibble) * W + word % W] = value;
            sums[word] += value;
          }
  }
};

// The code in nibble j of every word, plus 16: as the first four digits of a number between 16 and 32.
template <int J>
inline Floats code(Words w) {
  Words digits = 4 * J < 19 ? w << (19 - 4 * J) : w >> (4 * J - 19);
  return (Floats)((digits & 0x780000u) | 0x41800000u);
}

// Scale (low half) and offset (high half) of the groups that W words belong to.
inline Words scales_of(const uint32_t* scales, int64_t word, int64_t last, int shift) {
  auto s = [&](int64_t lane) { return scales[std::min(word + lane, last) >> shift]; };
#if defined(__AVX512F__)
  uint32_t a = s(0), b = s(4), c = s(8), d = s(12);
  return Words{a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d};
#elif defined(__AVX2__)
  uint32_t a = s(0), b = s(4);
  return Words{a, a, a, a, b, b, b, b};
#else
  return Words{s(0), s(0), s(0), s(0)};
#endif
}

template <int K>
inline void dots_int4(const uint32_t* w, const uint32_t* scales, const Linear& l, const Input& x, int64_t row0,
                      float* out) {
  Floats total[K] = {};
  int64_t words = l.in / RUN * WORDS;
  int shift = l.group == 128 ? 4 : l.group == 64 ? 3 : 2;  // words of a group, as a power of 2
  for (int64_t i = 0; i < words; i += W) {
    uint32_t rest[W] = {};  // the inputs that stand for what is missing are 0
    Words codes, s = scales_of(scales, i, words - 1, shift);
    if (i + W <= words) codes = read<Words>(w + i);
    else codes = read<Words>(std::memcpy(rest, w + i, (words - i) * 4));
    Floats factor = (Floats)(s << 16), offset = (Floats)(s & 0xffff0000u) - 24.0f * factor;
    for (int k = 0; k < K; k++) {
      const float* in = x.ordered.data() + ((row0 + k) * x.words + i) * 8;
      Floats a = code<0>(codes) * load(in), b = code<1>(codes) * load(in + W);
      a += code<2>(codes) * load(in + 2 * W), b += code<3>(codes) * load(in + 3 * W);
      a += code<4>(codes) * load(in + 4 * W), b += code<5>(codes) * load(in + 5 * W);
      a += code<6>(codes) * load(in + 6 * W), b += code<7>(codes) * load(in + 7 * W);
      total[k] += factor * (a + b) + offset * load(x.sums.data() + (row0 + k) * x.words + i);
    }
  }
  for (int k = 0; k < K; k++) out[k] = sum(total[k]);
}

// Rows lo .. hi - 1 of W x for N vectors x: out[n * l.out + row].
template <class T>
void multiply_as(const Linear& l, const Input& x, int64_t N, int64_t lo, int64_t hi, float* out) {
  for (int64_t row = lo; row < hi; row++)
    by_fours(N, [&](int64_t n, auto K) {
      float y[K];
      if constexpr (std::is_same<T, uint32_t>::value)
        dots_int4<K>(static_cast<const uint32_t*>(l.weight) + row * (l.in / 8),
                     static_cast<const uint32_t*>(l.scale) + row * (l.in / l.group), l, x, n, y);
      else
        dots<K>(static_cast<const T*>(l.weight) + row * l.in, x.plain.data() + n * l.in, l.in, l.in, y);
      float factor = l.format == 2 ? static_cast<const float*>(l.scale)[row] : 1.0f;
      for (int k = 0; k < K; k++) out[(n + k) * l.out + row] = y[k] * factor + (l.bias ? l.bias[row] : 0.0f);
    });
}

void multiply(const Linear& l, const Input& x, int64_t N, int64_t lo, int64_t hi, float* out) {
  (l.format == 0   ? multiply_as<float>
   : l.format == 1 ? multiply_as<bfloat16>
   : l.format == 2 ? multiply_as<int8_t>
                   : multiply_as<uint32_t>)(l, x, N, lo, hi, out);
}

int64_t row_bytes(const Linear& l) {
  const int64_t bits[] = {32, 16, 8, 4};
  return l.in * bits[l.format] / 8;
}

// ----------------------------------------------------------------------------------------------- between the products

void normalize(const Norm& norm, const float* x, float* y) {
  int64_t n = norm.size;
  float mean = 0, squares = 0;
  if (norm.kind == 2) {
    for (int64_t i = 0; i < n; i++) mean += x[i];
    mean /= n;
  }
  Floats s = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) s += (load(x + i) - mean) * (load(x + i) - mean);
  for (squares = sum(s); i < n; i++) squares += (x[i] - mean) * (x[i] - mean);
  float factor = 1.0f / std::sqrt(squares / n + float(norm.eps));
  if (!norm.weight)
    for (i = 0; i < n; i++) y[i] = (x[i] - mean) * factor;
  else
    for (i = 0; i < n; i++) y[i] = (x[i] - mean) * factor * norm.weight[i];
  if (norm.bias)
    for (i = 0; i < n; i++) y[i] += norm.bias[i];
}

// Rotate pairs (i, i + n / 2) of the first n elements; sin holds the signs of both halves.
template <class T>
void rotate(const T* x, const float* cos, const float* sin, int64_t n, int64_t size, float* y) {
  for (int64_t i = 0, h = n / 2; i < h; i++) {
    float a = number(x[i]), b = number(x[i + h]);
    y[i] = a * cos[i] + b * sin[i];
    y[i + h] = b * cos[i + h] + a * sin[i + h];
  }
  for (int64_t i = n; i < size; i++) y[i] = number(x[i]);
}

float soften(float x, float cap) { return cap * std::tanh(x / cap); }
float gaussian(float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678f)); }

void activate(int64_t which, float* x, int64_t n) {  // silu, gelu, gelu_tanh, relu
  if (which == 0)
    for (int64_t i = 0; i < n; i++) x[i] = x[i] / (1.0f + exponential(-x[i]));
  if (which == 1)
    for (int64_t i = 0; i < n; i++) x[i] = gaussian(x[i]);
  if (which == 2)  // (1 + tanh(u)) / 2 = 1 / (1 + e^-2u)
    for (int64_t i = 0; i < n; i++)
      x[i] = x[i] / (1.0f + exponential(-1.59576912f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
  if (which == 3)
    for (int64_t i = 0; i < n; i++) x[i] = std::max(x[i], 0.0f);
}

// ------------------------------------------------------------------------------------------------------------ the step

constexpr int64_t SPINS = 300, YIELDS = 3000;  // of a thread without work, before it lets others run, and sleeps
constexpr int64_t KEYS = 128;   // keys whose scores a thread holds at once
constexpr int64_t PIECES = 32;  // of a row's keys, at most: so many threads can share them
enum { QKV, ATTEND, PROJ, MLP_IN, MLP_OUT, STAGES };

struct Unit {  // the keys lo .. hi - 1 of a row's list, for one group of heads: a piece of that row's softmax
  int64_t row, group, piece, lo, hi;
};
struct Lists {  // of a kind: every row's visible slots, and the part whose queries see each
  std::vector<int64_t> slot, part;
  std::vector<Unit> units;
};

struct Step {
  const Model& m;
  int64_t N = 0, R, D, pieces = 1, parts = 1, stage = 0, chunk = 1;
  const Call* call = nullptr;
  Input normed, attended, hidden;
  Buffer qkv, queries, partial, t, gate;
  std::vector<Lists> lists;

  explicit Step(const Model& model) : m(model), R(m.heads / m.groups), D(m.head_size) {}

  const Layer& layer() const { return m.layer[stage / STAGES]; }
  const Kind& kind() const { return call->kind[layer().kind]; }
  const Linear& linear() const {
    if (stage == STAGES * m.layers) return m.head;
    const Linear* all[] = {&layer().qkv, nullptr, &layer().proj, &layer().fc_1, &layer().out};
    return *all[stage % STAGES];
  }
  bool ended() const { return stage > STAGES * m.layers; }
  bool attends() const { return stage < STAGES * m.layers && stage % STAGES == ATTEND; }
  float* softmax(int64_t row, int64_t head, int64_t piece) {  // maximum, sum, and D values
    return partial.data() + ((row * m.heads + head) * pieces + piece) * (D + 2);
  }

  void begin(const Call& c) {
    call = &c, N = c.batch * c.tokens, stage = 0, pieces = parts = 1;
    lists.resize(c.kinds);
    for (int64_t i = 0; i < c.kinds; i++) list_slots(c.kind[i], lists[i]);
    qkv.resize(N * (m.heads + 2 * m.groups) * D);
    queries.resize(N * parts * m.heads * D);
    partial.resize(N * m.heads * pieces * (D + 2));
    t.resize(N * m.embd);
    attended.plain.resize(N * m.heads * D);
    normed.plain.resize(N * m.embd);
    int64_t most = 0;
    for (int64_t i = 0; i < m.layers; i++) most = std::max(most, m.layer[i].fc_1.out);
    hidden.plain.resize(N * most);
    gate.resize(N * most);
    normalize_x(m.layer[0].norm_1, m.layer[0].qkv);
  }

  void list_slots(const Kind& kind, Lists& l) {
    l.slot.clear(), l.part.clear(), l.units.clear();
    for (int64_t row = 0; row < N; row++) {
      int64_t first = l.slot.size(), b = row / call->tokens, t = row % call->tokens;
      for (const Seen* s = kind.seen; s < kind.seen + kind.seen_count; s++)
        for (int64_t i = 0; i < s->count; i++)
          if (!s->mask || s->mask[b * s->b + t * s->t + i]) l.slot.push_back(s->first + i), l.part.push_back(s->part);
      int64_t n = l.slot.size() - first, size = std::max(KEYS, (n + PIECES - 1) / PIECES);
      for (int64_t lo = 0, piece = 0; lo < n; lo += size, piece++) {
        pieces = std::max(pieces, piece + 1);
        for (int64_t g = 0; g < m.groups; g++)
          l.units.push_back({row, g, piece, first + lo, first + std::min(n, lo + size)});
      }
    }
    parts = std::max(parts, kind.parts);
  }

  int64_t open() {  // how many chunks the stage has
    if (attends()) return lists[layer().kind].units.size();
    const Linear& l = linear();
    chunk = std::max<int64_t>(16, (1 << 14) / row_bytes(l) / 16 * 16);  // 16 results fill a cache line
    return (l.out + chunk - 1) / chunk;
  }

  void run(int64_t index) {
    if (attends()) return attend(lists[layer().kind].units[index]);
    const Linear& l = linear();
    int64_t lo = index * chunk, hi = std::min(l.out, lo + chunk);
    if (stage == STAGES * m.layers) return make_logits(lo, hi);
    switch (stage % STAGES) {
      case QKV: return multiply(l, normed, N, lo, hi, qkv.data());
      case PROJ: return multiply(l, attended, N, lo, hi, t.data());
      case MLP_OUT: return multiply(l, hidden, N, lo, hi, t.data());
      default: return make_hidden(lo, hi);
    }
  }

  void make_hidden(int64_t lo, int64_t hi) {
    const Layer& l = layer();
    multiply(l.fc_1, normed, N, lo, hi, hidden.plain.data());
    if (l.fc_2.out) multiply(l.fc_2, normed, N, lo, hi, gate.data());
    for (int64_t n = 0; n < N; n++) {
      float* h = hidden.plain.data() + n * l.fc_1.out;
      activate(m.activation, h + lo, hi - lo);
      if (l.fc_2.out)
        for (int64_t i = lo; i < hi; i++) h[i] *= gate[n * l.fc_1.out + i];
    }
  }

  void make_logits(int64_t lo, int64_t hi) {
    multiply(m.head, normed, N, lo, hi, call->logits);
    for (int64_t n = 0; m.logit_scale != 1 && n < N; n++)
      for (int64_t i = n * m.head.out + lo; i < n * m.head.out + hi; i++) call->logits[i] *= float(m.logit_scale);
    for (int64_t n = 0; m.logit_cap && n < N; n++)
      for (int64_t i = n * m.head.out + lo; i < n * m.head.out + hi; i++)
        call->logits[i] = soften(call->logits[i], m.logit_cap);
  }

  void finish() {  // what follows on a stage whose chunks are all done
    if (stage < STAGES * m.layers) {
      const Layer& l = layer();
      switch (stage % STAGES) {
        case QKV: kind().cache_bfloat16 ? rotate_and_write<bfloat16>() : rotate_and_write<float>(); break;
        case ATTEND: merge_pieces(); if (l.proj.format == 3) attended.order(N, l.proj.in); break;
        case PROJ:
          if (m.parallel) normalize_x(l.norm_2, l.fc_1, l.fc_2.format);
          add(l.post_attention);
          if (!m.parallel) normalize_x(l.norm_2, l.fc_1, l.fc_2.format);
          break;
        case MLP_IN: if (l.out.format == 3) hidden.order(N, l.out.in); break;
        case MLP_OUT:
          add(l.post_mlp);
          if (&l + 1 < m.layer + m.layers) normalize_x((&l + 1)->norm_1, (&l + 1)->qkv);
          else normalize_x(m.ln_f, m.head);
      }
    }
    stage++;
  }

  void normalize_x(const Norm& norm, const Linear& next, int64_t format = 0) {
    for (int64_t n = 0; n < N; n++) {
      float *x = call->x + n * m.embd, *y = normed.plain.data() + n * m.embd;
      if (norm.kind) normalize(norm, x, y);
      else std::copy(x, x + m.embd, y);
    }
    if (next.format == 3 || format == 3) normed.order(N, m.embd);
  }

  void add(const Norm& norm) {  // to the residual stream
    for (int64_t n = 0; n < N; n++) {
      float *y = t.data() + n * m.embd, *x = call->x + n * m.embd;
      if (norm.kind) normalize(norm, y, y);
      for (int64_t i = 0; i < m.embd; i++) x[i] += float(m.residual) * y[i];
    }
  }

  template <class T>
  void rotate_and_write() {
    const Kind& k = kind();
    const Layer& l = layer();
    for (int64_t row = 0; row < N; row++) {
      int64_t b = row / call->tokens, t = row % call->tokens;
      float* x = qkv.data() + row * (m.heads + 2 * m.groups) * D;
      for (int64_t h = 0; h < m.heads; h++, x += D) {
        if (l.norm_q.kind) normalize(l.norm_q, x, x);
        if (k.temperature)
          for (int64_t i = 0; i < D; i++) x[i] *= k.temperature[row];
        for (int64_t p = 0; p < k.parts; p++) {
          const Angles& a = k.queries[p];
          int64_t at = b * a.b + t * a.t;
          rotate(x, a.cos + at, a.sin + at, m.rotated, D, queries.data() + ((row * parts + p) * m.heads + h) * D);
        }
      }
      for (int64_t g = 0; g < 2 * m.groups; g++, x += D) {
        bool value = g >= m.groups;
        if (!value && l.norm_k.kind) normalize(l.norm_k, x, x);
        Buffer turned(x, x + D);
        int64_t at = b * k.keys.b + t * k.keys.t;
        if (!value && !k.rotate_read) rotate(x, k.keys.cos + at, k.keys.sin + at, m.rotated, D, turned.data());
        T* cache = static_cast<T*>(call->caches[stage / STAGES * 2 + value]);
        for (int64_t c = 0; c < k.copies; c++) {
          int64_t slot = k.slots[c * N + row];
          T* to = cache + ((b * m.groups + g % m.groups) * k.cache_slots + slot) * D;
          for (int64_t i = 0; slot >= 0 && i < D; i++) put(to + i, turned[i]);
        }
      }
    }
  }

  void attend(const Unit& u) {
    if (kind().cache_bfloat16) attend_as<bfloat16>(u);
    else attend_as<float>(u);
  }

  template <class T>
  void attend_as(const Unit& u) {
    static thread_local Buffer scores, turned;
    scores.resize(R * KEYS), turned.resize(D);
    const Lists& l = lists[layer().kind];
    int64_t base = (u.row / call->tokens * m.groups + u.group) * kind().cache_slots * D;
    const T* keys = static_cast<const T*>(call->caches[stage / STAGES * 2]) + base;
    const T* values = static_cast<const T*>(call->caches[stage / STAGES * 2 + 1]) + base;
    for (int64_t r = 0; r < R; r++) {
      float* out = softmax(u.row, u.group * R + r, u.piece);
      std::fill(out, out + D + 2, 0.0f);
      out[0] = -INFINITY;
    }
    for (int64_t lo = u.lo; lo < u.hi; lo += KEYS) {
      int64_t n = std::min(KEYS, u.hi - lo);
      for (int64_t j = 0; j < n; j++) score(u, l.slot[lo + j], l.part[lo + j], keys, turned.data(), &scores[j]);
      for (int64_t r = 0; r < R; r++) weigh(softmax(u.row, u.group * R + r, u.piece), &scores[r * KEYS], n);
      by_fours(R, [&](int64_t r, auto K) {
        float* out[K];
        for (int k = 0; k < K; k++) out[k] = softmax(u.row, u.group * R + r + k, u.piece) + 2;
        add_values<K>(values, l.slot.data() + lo, n, &scores[r * KEYS], out);
      });
    }
  }

  template <class T>
  void score(const Unit& u, int64_t slot, int64_t part, const T* keys, float* turned, float* scores) {
    const float* q = queries.data() + ((u.row * parts + part) * m.heads + u.group * R) * D;
    const Angles& a = kind().keys;
    int64_t at = u.row / call->tokens * a.b + slot * m.rotated;
    if (kind().rotate_read) rotate(keys + slot * D, a.cos + at, a.sin + at, m.rotated, D, turned);
    by_fours(R, [&](int64_t r, auto K) {
      float y[K];
      if (kind().rotate_read) dots<K>(turned, q + r * D, D, D, y);
      else dots<K>(keys + slot * D, q + r * D, D, D, y);
      for (int k = 0; k < K; k++) {
        float s = y[k] * float(m.scale);
        scores[(r + k) * KEYS] = m.score_cap ? soften(s, m.score_cap) : s;
      }
    });
  }

  // Make weights of scores, relative to the greatest so far; what was summed before is rescaled to it.
  void weigh(float* out, float* scores, int64_t n) {
    float most[W], before = out[0];
    int64_t whole = (n + W - 1) / W * W;
    std::fill(scores + n, scores + whole, -INFINITY);
    Floats m = load(scores), total = {};
    for (int64_t j = W; j < whole; j += W) m = load(scores + j) > m ? load(scores + j) : m;
    store(most, m);
    out[0] = std::max(before, *std::max_element(most, most + W));
    float factor = before == -INFINITY ? 0.0f : exponential(before - out[0]);
    for (int64_t i = 1; i < D + 2; i++) out[i] *= factor;
    for (int64_t j = 0; j < whole; j++) scores[j] = exponential(scores[j] - out[0]);
    for (int64_t j = 0; j < whole; j += W) total += load(scores + j);
    out[1] += sum(total);
  }

  template <int K, class T>
  void add_values(const T* values, const int64_t* slots, int64_t n, const float* weights, float* const* out) {
    int64_t d = 0;
    for (; d + W <= D; d += W) {
      Floats a[K];
      for (int k = 0; k < K; k++) a[k] = load(out[k] + d);
      for (int64_t j = 0; j < n; j++) {
        Floats v = load(values + slots[j] * D + d);
        for (int k = 0; k < K; k++) a[k] += v * weights[k * KEYS + j];
      }
      for (int k = 0; k < K; k++) store(out[k] + d, a[k]);
    }
    for (; d < D; d++)
      for (int64_t j = 0; j < n; j++)
        for (int k = 0; k < K; k++) out[k][d] += number(values[slots[j] * D + d]) * weights[k * KEYS + j];
  }

  void merge_pieces() {
    std::vector<int64_t> count(N);
    for (const Unit& u : lists[layer().kind].units) count[u.row] = std::max(count[u.row], u.piece + 1);
    for (int64_t row = 0; row < N; row++)
      for (int64_t h = 0; h < m.heads; h++) {
        float *y = attended.plain.data() + (row * m.heads + h) * D, greatest = -INFINITY, total = 0;
        for (int64_t p = 0; p < count[row]; p++) greatest = std::max(greatest, softmax(row, h, p)[0]);
        std::fill(y, y + D, 0.0f);
        for (int64_t p = 0; p < count[row]; p++) {
          float *from = softmax(row, h, p), factor = exponential(from[0] - greatest);
          total += factor * from[1];
          for (int64_t d = 0; d < D; d++) y[d] += factor * from[2 + d];
        }
        for (int64_t d = 0; d < D; d++) y[d] /= total;
      }
  }
};

// --------------------------------------------------------------------------------------------------------- the threads

// A thread takes chunks from its own lane, a run of neighbours (two threads that alternate read memory a fifth slower),
// and then from the others'. A lane's ticket says how many chunks the lane has (upper half) and which is next (lower
// half), so whoever draws a number has a chunk of the stage that is open: it cannot end before the chunk is done.
struct Pool {
  struct alignas(64) Lane {
    std::atomic<uint64_t> ticket{0};
    bool draw(int64_t& chunk) {
      uint64_t t = ticket.load();
      if (uint32_t(t) >= t >> 32) return false;
      t = ticket.fetch_add(1), chunk = uint32_t(t);
      return uint32_t(t) < t >> 32;
    }
  };
  static constexpr int64_t LANES = 256;
  Lane lanes[LANES];
  std::atomic<uint64_t> stage{0};  // counted on over all calls
  std::atomic<int64_t> done{0}, active{0};
  std::atomic<bool> running{false};
  Step* step = nullptr;
  std::mutex calls, sleep;
  std::condition_variable wake;
  int64_t chunks = 0, workers = 0;

  int64_t first(int64_t lane) const { return lane * chunks / active; }

  void open() {
    chunks = step->open();
    done = 0;
    stage++;
    for (int64_t i = 0; i < active; i++) lanes[i].ticket = uint64_t(first(i + 1) - first(i)) << 32;
  }

  bool work(int64_t self) {  // do one chunk; false: there was none
    int64_t chunk, count = active;
    for (int64_t i = 0; i < count && self < count; i++) {
      int64_t lane = (self + i) % count;
      if (!lanes[lane].draw(chunk)) continue;
      int64_t all = chunks;  // of this stage: once this chunk is counted, the next one may begin
      step->run(first(lane) + chunk);
      if (++done == all) {
        step->finish();
        if (step->ended()) running = false;
        else open();
      }
      return true;
    }
    return false;
  }

  static void wait(int64_t n) {  // for a chunk that another thread does
    if (n > SPINS) std::this_thread::yield();
#if defined(__x86_64__)
    else __builtin_ia32_pause();
#endif
  }

  void serve(int64_t self) {  // a worker's life
    for (int64_t idle = 0;; idle++) {
      uint64_t seen = stage;
      if (work(self)) idle = -1;
      else if (idle < SPINS + YIELDS) wait(idle);
      else {
        std::unique_lock<std::mutex> lock(sleep);
        wake.wait(lock, [&] { return stage != seen; });
        idle = -1;
      }
    }
  }

  void run(Step& s, const Call& call) {
    std::lock_guard<std::mutex> one(calls);
    int64_t threads = std::min(std::max<int64_t>(call.threads, 1), LANES);
    for (; workers < threads - 1; workers++) std::thread([this, id = workers + 1] { serve(id); }).detach();
    s.begin(call);
    {
      std::lock_guard<std::mutex> lock(sleep);
      step = &s, active = threads, running = true;
      open();
    }
    wake.notify_all();
    for (int64_t idle = 0; running; idle++)
      if (work(0)) idle = -1;
      else wait(idle);
  }
};

Pool& pool() {
  static Pool* p = new Pool;  // never freed: its threads live as long as the process
  return *p;
}

}  // namespace

extern "C" {
void* step_new(const Model* model) { return new Step(*model); }
void step_free(void* step) { delete static_cast<Step*>(step); }
void step_run(void* step, const Call* call) { pool().run(*static_cast<Step*>(step), *call); }
}
