// All time steps of an LSTM, a GRU or Melis's LSTM in one launch per direction.
// Formulas: lstm.py, gru.py, mogrifier.py (without rounds). Launches and the choice of sizes: persistent.py.
//
//     H units, B columns of the batch, T steps, G gates (4 in an LSTM, 3 in a GRU)
//     block       a CUDA block. It owns UNITS units: it computes their gates, and keeps their state.
//     cell        a unit in one column. One thread computes it in all steps, and keeps its state in shared memory.
//     tile        a part of a matrix: 16 x 16 of the weights, 16 x 8 of the vectors that they are multiplied by
//     chunk       TILES tiles of 8 columns, which are multiplied at once
//     exchange    memory through which all blocks pass h (forward) or the gates' gradients (backward), in half precision
//
// The recurrent weights never leave the registers. The first thing that a block does is to read the rows (forward) or
// columns (backward) of its units, to drop and round them, and to put them where `mma` expects its first factor.
// The tiles along the summed dimension are dealt out to the 8 warps in turn, so every warp reads other parts of the
// exchange, once per step, and in the order in which `mma` expects its second factor. Then the block adds up the 8
// partial sums through shared memory. Per step:
//
//     forward                                        backward, from the last step to the first
//     wait until all blocks have written h           cells: gradients of the gates, written to the exchange
//     W · h, 8 partial sums                          wait until all blocks have written theirs
//     cells: sums, gates, state, h                   Wᵀ · gradients, 8 partial sums; the sums are the gradient of h
//     h is written to the exchange
//
// The exchange has two halves, used in turn: a fast block may write for the next step while a slow one still reads.
//
// Factors have the 11 bits of half precision, as many as in TF32; sums are in float. Before gradients are rounded they
// are multiplied by a power of two, as half precision has fewer exponents. The weights' own gradients and that of the
// layer's input are products over all steps, which persistent.py leaves to cuBLAS.
//
// Constants that the compiler is given (-D): CELL (LSTM, GRU or MELIS), H, B, UNITS_FORWARD, UNITS_BACKWARD. No header is
// included: NVRTC then needs none, and a C++ compiler can build this text against tests/cuda_fibers.h.

typedef long long i64;
typedef unsigned u32;
typedef unsigned short u16;
typedef unsigned char u8;

#ifdef __CUDACC__  // a C++ compiler's shim brings its own
#define SHARED_FLOATS(name) extern __shared__ float name[]

// sums (16 x 8) += a (16 x 16) · b (16 x 8). All threads of a warp take part, each holds some elements; its lane gives
// the row, (lane / 4), of a and sums, the column of b, and with 2 · (lane % 4) the first of a pair in the other dimension.
__device__ inline void mma(float (&sums)[4], const u32 (&a)[4], uint2 b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}
__device__ inline u16 to_half(float x) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
// Memory that other blocks write to or read from. `relaxed` loads and stores pass by this processor's own cache.
__device__ inline uint2 load_shared_by_all(const uint2* from) {
  uint2 x;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(from) : "memory");
  return x;
}
__device__ inline void store_shared_by_all(u16* to, u16 x) {
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(to), "h"(x) : "memory");
}
// Asks for memory that will be read soon, without waiting and without a register to hold it.
__device__ inline void prefetch(const float* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }
__device__ inline void arrive(u32* count) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
}
__device__ inline u32 arrived(const u32* count) {
  u32 n;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(n) : "l"(count) : "memory");
  return n;
}
#endif

#define LSTM 1
#define GRU 2
#define MELIS 3

constexpr int GATES = CELL == GRU ? 3 : 4;
constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int UNIT_TILES = (H + 15) / 16;
constexpr int BATCH_TILES = (B + 7) / 8;
constexpr int CHUNKS = (BATCH_TILES + 2) / 3;  // of 3 tiles at most, for which there are registers
constexpr int TILES = (BATCH_TILES + CHUNKS - 1) / CHUNKS;
constexpr int COLUMNS = 8 * TILES;   // of a chunk
constexpr int STRIDE = COLUMNS + 2;  // of the partial sums: neighbouring units then lie in different banks
constexpr int COUNTER_WORDS = 32;  // the scratch memory begins with the barrier's counter

// One direction's constants. ROWS: rows of the block's matrix; K_TILES: tiles along the dimension that is summed over.
template <int UNITS_, int ROWS_, int K_TILES_>
struct Sizes {
  static constexpr int UNITS = UNITS_, ROWS = ROWS_, K_TILES = K_TILES_;
  static constexpr int ROW_TILES = (ROWS + 15) / 16;
  static constexpr int STEPS = (K_TILES + WARPS - 1) / WARPS;  // tiles per warp; of the last ones only some warps have any
  static constexpr int AHEAD = STEPS < 4 ? STEPS : 4;          // steps whose loads are under way at a time
  static constexpr int CELLS = (UNITS * (B < COLUMNS ? B : COLUMNS) + THREADS - 1) / THREADS;  // per thread and chunk
  static constexpr int EXCHANGE = K_TILES * BATCH_TILES * 128;  // 16-bit elements of one half of the exchange
  static constexpr int PARTIAL = WARPS * ROW_TILES * 16 * STRIDE;  // floats of the partial sums
  static constexpr int SLOTS = CHUNKS * CELLS * THREADS;           // floats of a number per cell
};
typedef Sizes<UNITS_FORWARD, GATES * UNITS_FORWARD, UNIT_TILES> Forward;
typedef Sizes<UNITS_BACKWARD, UNITS_BACKWARD, GATES * UNIT_TILES> Backward;

#define UNROLL(i, n) _Pragma("unroll") for (int i = 0; i < (n); ++i)

__device__ inline float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }
__device__ inline float tanh_of(float x) { return 2.f * sigmoid(2.f * x) - 1.f; }

// All blocks wait here for each other, the n-th time (from 1).
__device__ inline void grid_barrier(u32* count, u32 n) {
  __syncthreads();
  if (threadIdx.x == 0) {
    arrive(count);
    while (arrived(count) < n * gridDim.x) {
    }
  }
  __syncthreads();
}

// The recurrent matrix (G·H, H), dropped: elements where keep is 0 become 0, others are multiplied by scale.
struct Weight {
  const float* raw;
  const u8* keep;  // null: nothing is dropped
  float scale;
  __device__ inline float at(int row, int column) const {
    const int i = row * H + column;
    return keep && !keep[i] ? 0.f : raw[i] * scale;
  }
};

// Element (m, k) of the matrix of this block: rows are its units' gates, k is a unit of h before the step.
struct ForwardElement {
  Weight weight;
  __device__ inline float operator()(int m, int k) const {
    const int unit = blockIdx.x * UNITS_FORWARD + m % UNITS_FORWARD;
    return m < Forward::ROWS && unit < H && k < H ? weight.at(m / UNITS_FORWARD * H + unit, k) : 0.f;
  }
};
// The same for the transposed matrix: rows are its units, k is a gate, each with its units padded to whole tiles.
struct BackwardElement {
  Weight weight;
  __device__ inline float operator()(int m, int k) const {
    const int unit = blockIdx.x * UNITS_BACKWARD + m, of = k % (16 * UNIT_TILES);
    return m < UNITS_BACKWARD && unit < H && of < H ? weight.at(k / (16 * UNIT_TILES) * H + of, unit) : 0.f;
  }
};

// The block's matrix, for all time steps. A warp has the tiles warp, warp + 8, ... along k.
template <typename S, typename Element>
__device__ inline void load_weights(u32 (&w)[S::STEPS][S::ROW_TILES][4], Element element) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  UNROLL(step, S::STEPS) {
    __syncwarp();  // or the compiler asks for all weights at once, for which there are not enough registers
    UNROLL(tile, S::ROW_TILES) UNROLL(part, 4) {
      const int m = 16 * tile + lane / 4 + 8 * (part % 2);
      const int k = 16 * (WARPS * step + warp) + 2 * (lane % 4) + 8 * (part / 2);
      w[step][tile][part] = k < 16 * S::K_TILES ? to_half(element(m, k)) | (u32)to_half(element(m, k + 1)) << 16 : 0;
    }
  }
}

// Where element (k, column) lies in the exchange: in the order of mma's second factor, tile after tile.
__device__ inline int place(int k, int column) {
  const int tile = k / 16 * BATCH_TILES + column / 8, lane = column % 8 * 4 + k % 8 / 2;
  return (tile * 32 + lane) * 4 + k % 16 / 8 * 2 + k % 2;
}

// This warp's part of the product of the block's matrix and a chunk of the exchange, written to shared memory.
template <typename S>
__device__ inline void multiply(const u32 (&w)[S::STEPS][S::ROW_TILES][4], const u16* exchange, int chunk, float* partial) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float sums[S::ROW_TILES][TILES][4] = {};
  uint2 x[S::AHEAD][TILES];
  const auto load = [&](int step) {
    const int k_tile = WARPS * step + warp;
    UNROLL(n, TILES) {
      const int tile = chunk * TILES + n;
      const bool used = k_tile < S::K_TILES && 8 * tile + lane / 4 < B;
      const uint2* from = (const uint2*)exchange + (k_tile * BATCH_TILES + tile) * 32 + lane;
      x[step % S::AHEAD][n] = used ? load_shared_by_all(from) : uint2{0, 0};
    }
  };
  UNROLL(step, S::AHEAD) load(step);
  UNROLL(step, S::STEPS) {
    UNROLL(tile, S::ROW_TILES) UNROLL(n, TILES) mma(sums[tile][n], w[step][tile], x[step % S::AHEAD][n]);
    if (step + S::AHEAD < S::STEPS) load(step + S::AHEAD);
  }
  UNROLL(tile, S::ROW_TILES) UNROLL(n, TILES) {
    float* to = partial + ((warp * S::ROW_TILES + tile) * 16 + lane / 4) * STRIDE + 8 * n + 2 * (lane % 4);
    to[0] = sums[tile][n][0], to[1] = sums[tile][n][1];
    to[8 * STRIDE] = sums[tile][n][2], to[8 * STRIDE + 1] = sums[tile][n][3];
  }
}

// The sum of all warps' parts, for a row of the block's matrix and a column of the chunk.
template <typename S>
__device__ inline float add_up(const float* partial, int row, int column) {
  float sum = 0.f;
  UNROLL(warp, WARPS) sum += partial[(warp * S::ROW_TILES * 16 + row) * STRIDE + column];
  return sum;
}

// The j-th of this thread's cells in a chunk. The last block and the last chunk have some that do not exist.
template <typename S>
struct Cell {
  int u, column, unit, b, at;  // unit within the block, column within the chunk; `at`: b · H + unit
  int slot;                    // its place in shared memory, which no other thread uses
  bool exists;
  __device__ inline Cell(int chunk, int j) {
    const int i = threadIdx.x + THREADS * j;
    u = i % S::UNITS, column = i / S::UNITS, slot = chunk * S::CELLS * THREADS + i;
    unit = blockIdx.x * S::UNITS + u, b = chunk * COLUMNS + column, at = b * H + unit;
    exists = column < COLUMNS && b < B && unit < H;
  }
};
#define FOR_EACH_CELL(S, cell)                                                            \
  for (int chunk_ = 0; chunk_ < CHUNKS; ++chunk_) UNROLL(j_, S::CELLS)                 \
    if (const Cell<S> cell(chunk_, j_); cell.exists)

// One step of a cell. y: W·x + b in, the gates out. u: the recurrent product. Returns h.
__device__ inline float step_forward(float (&y)[GATES], const float (&u)[GATES], float& state, float& inner) {
#if CELL == GRU
  y[0] = sigmoid(y[0] + u[0]), y[1] = sigmoid(y[1] + u[1]), inner = u[2];
  y[2] = tanh_of(y[2] + y[0] * inner);
  return state = y[2] + y[1] * (state - y[2]);
#else
  UNROLL(g, GATES) y[g] = g == 2 ? tanh_of(y[g] + u[g]) : sigmoid(y[g] + u[g]);
  const float input = CELL == MELIS ? fminf(y[0], 1.f - y[1]) : y[0];
  state = y[1] * state + input * y[2];
  return y[3] * tanh_of(state);
#endif
}

// Its derivatives: d_y of W·x + b, from d_h of h. before, after: the state around the step (of a GRU h, else c).
// d_state: the gradient that reaches the state by its own recurrence. Returns the factor of the last gate's gradient
// in that of the recurrent product: r in a GRU.
__device__ inline float step_backward(float (&d_y)[GATES], const float (&y)[GATES], float before, float after, float inner,
                                      float d_h, float& d_state) {
#if CELL == GRU
  const float r = y[0], z = y[1], n = y[2];
  d_y[2] = d_h * (1.f - z) * (1.f - n * n);
  d_y[1] = d_h * (before - n) * z * (1.f - z);
  d_y[0] = d_y[2] * inner * r * (1.f - r);
  d_state = d_h * z;
  return r;
#else
  const float i = y[0], f = y[1], g = y[2], o = y[3], tanh_c = tanh_of(after), d_o = d_h * tanh_c;
  const float d_c = d_state + d_h * o * (1.f - tanh_c * tanh_c), d_input = d_c * g;
  // Melis's input gate is min(i, 1 - f): the gradient goes to the smaller of the two
  const bool free = CELL != MELIS || i < 1.f - f;
  d_y[0] = free ? d_input * i * (1.f - i) : 0.f;
  d_y[1] = (d_c * before - (free ? 0.f : d_input)) * f * (1.f - f);
  d_y[2] = d_c * (free ? i : 1.f - f) * (1.f - g * g);
  d_y[3] = d_o * o * (1.f - o);
  d_state = d_c * f;
  return 1.f;
#endif
}

// weight (G·H, H), keep (G·H, H) or null, scale: see Weight. bias (G·H,), added to the recurrent product: of a GRU only.
// mask (B, H) or null, multiplied into h before each step. gates (T, B, G·H): W·x + b in, the gates out.
// states (T + 1, B, H): c, of a GRU h; the first one is given. out (T + 1, B, H): h, the first one is given; of a GRU
// the same memory as states. inner (T, B, H), of a GRU only: the recurrent product of the new gate.
// scratch: zeros. The counter of the barrier, then the exchange.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    persistent_forward(const float* weight, const u8* keep, const float* bias, const float* mask, float* gates, float* states,
                       float* out, float* inner, u32* scratch, float scale, i64 T) {
  typedef Forward S;
  SHARED_FLOATS(shared);
  float *const partial = shared, *const state = partial + S::PARTIAL, *const factor = state + S::SLOTS;
  u16* const exchange = (u16*)(scratch + COUNTER_WORDS);
  u32 w[S::STEPS][S::ROW_TILES][4];
  load_weights<S>(w, ForwardElement{{weight, keep, scale}});
  FOR_EACH_CELL(S, cell) {
    state[cell.slot] = states[cell.at];
    factor[cell.slot] = mask ? mask[cell.at] : 1.f;
    store_shared_by_all(exchange + place(cell.unit, cell.b), to_half(out[cell.at] * factor[cell.slot]));
  }
  for (i64 t = 0; t < T; ++t) {
    grid_barrier(scratch, t + 1);
    const u16* const received = exchange + t % 2 * S::EXCHANGE;
    u16* const sent = exchange + (t + 1) % 2 * S::EXCHANGE;
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      float y[S::CELLS][GATES];  // asked for before the product, needed after it
      UNROLL(j, S::CELLS)
        if (const Cell<S> cell(chunk, j); cell.exists)
          UNROLL(g, GATES) y[j][g] = gates[((t * B + cell.b) * GATES + g) * H + cell.unit];
      multiply<S>(w, received, chunk, partial);
      __syncthreads();
      UNROLL(j, S::CELLS) {
        const Cell<S> cell(chunk, j);
        if (!cell.exists) continue;
        float u[GATES], recurrent_n;
        UNROLL(g, GATES) {
          u[g] = add_up<S>(partial, g * S::UNITS + cell.u, cell.column);
          if (CELL == GRU) u[g] += bias[g * H + cell.unit];
        }
        const float h = step_forward(y[j], u, state[cell.slot], recurrent_n);
        store_shared_by_all(sent + place(cell.unit, cell.b), to_half(h * factor[cell.slot]));
        out[(t + 1) * B * H + cell.at] = h;
        if (CELL == GRU) inner[t * B * H + cell.at] = recurrent_n;
        if (CELL != GRU) states[(t + 1) * B * H + cell.at] = state[cell.slot];
        UNROLL(g, GATES) gates[((t * B + cell.b) * GATES + g) * H + cell.unit] = y[j][g];
      }
      if (chunk + 1 < CHUNKS) __syncthreads();  // the partial sums have been read
    }
  }
}

// The nearest number in the range of half precision. NaN stays NaN, as it would not with fminf.
__device__ inline float bounded(float x) { return x > 65504.f ? 65504.f : x < -65504.f ? -65504.f : x; }

// A power of two that brings numbers up to `largest` below 32: half precision goes on to 65504.
__device__ inline float power_of_two_for(float largest) {
  const int exponent = 127 + 5 + 126 - (int)(__float_as_uint(largest) >> 23 & 255);
  return __uint_as_float((u32)(exponent < 1 ? 1 : exponent > 254 ? 254 : exponent) << 23);
}

// weight, keep, mask, gates, states, inner: as persistent_forward left them. d_out (T, B, H); d_last (B, H): of the last
// c, or null. largest: a number that bounds the elements of d_out and d_last.
// d_gates (T, B, G·H), d_h, d_c (B, H): the results. A GRU's inner becomes the gradient of the new gate's recurrent product.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    persistent_backward(const float* weight, const u8* keep, const float* mask, const float* gates, const float* states,
                        float* inner, const float* d_out, const float* d_last, const float* largest, float* d_gates,
                        float* d_h, float* d_c, u32* scratch, float scale, i64 T) {
  typedef Backward S;
  SHARED_FLOATS(shared);
  float *const partial = shared, *const d_state = partial + S::PARTIAL, *const d_recurrent = d_state + S::SLOTS;
  float* const factor = d_recurrent + S::SLOTS;
  u16* const exchange = (u16*)(scratch + COUNTER_WORDS);
  u32 w[S::STEPS][S::ROW_TILES][4];
  load_weights<S>(w, BackwardElement{{weight, keep, scale}});
  const float up = power_of_two_for(*largest), down = 1.f / up;
  FOR_EACH_CELL(S, cell) {
    d_state[cell.slot] = d_last ? d_last[cell.at] : 0.f;
    d_recurrent[cell.slot] = 0.f;
    factor[cell.slot] = mask ? mask[cell.at] : 1.f;
  }
  for (i64 t = T - 1; t >= 0; --t) {
    u16* const passed_on = exchange + t % 2 * S::EXCHANGE;
    FOR_EACH_CELL(S, cell) {
      float y[GATES], d_y[GATES];
      UNROLL(g, GATES) y[g] = gates[((t * B + cell.b) * GATES + g) * H + cell.unit];
      const float before = states[t * B * H + cell.at], after = CELL == GRU ? 0.f : states[(t + 1) * B * H + cell.at];
      const float inner_n = CELL == GRU ? inner[t * B * H + cell.at] : 0.f;
      const float d = d_out[t * B * H + cell.at] + d_recurrent[cell.slot];
      const float last_factor = step_backward(d_y, y, before, after, inner_n, d, d_state[cell.slot]);
      UNROLL(g, GATES) {
        d_gates[((t * B + cell.b) * GATES + g) * H + cell.unit] = d_y[g];
        if (g == GATES - 1) d_y[g] *= last_factor;
        store_shared_by_all(passed_on + place(16 * UNIT_TILES * g + cell.unit, cell.b), to_half(bounded(d_y[g] * up)));
      }
      if (CELL == GRU) inner[t * B * H + cell.at] = d_y[GATES - 1];
    }
    grid_barrier(scratch, T - t);
    if (t > 0) FOR_EACH_CELL(S, cell) {  // what the next step reads
      UNROLL(g, GATES) prefetch(gates + (((t - 1) * B + cell.b) * GATES + g) * H + cell.unit);
      prefetch(states + (t - 1) * B * H + cell.at), prefetch(d_out + (t - 1) * B * H + cell.at);
      if (CELL == GRU) prefetch(inner + (t - 1) * B * H + cell.at);
    }
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      multiply<S>(w, passed_on, chunk, partial);
      __syncthreads();
      UNROLL(j, S::CELLS) {
        const Cell<S> cell(chunk, j);
        if (!cell.exists) continue;
        const float d = add_up<S>(partial, cell.u, cell.column) * down * factor[cell.slot];
        d_recurrent[cell.slot] = d + (CELL == GRU ? d_state[cell.slot] : 0.f);
      }
      if (chunk + 1 < CHUNKS) __syncthreads();  // the partial sums have been read
    }
  }
  FOR_EACH_CELL(S, cell) {
    d_h[cell.at] = d_recurrent[cell.slot];
    if (CELL != GRU) d_c[cell.at] = d_state[cell.slot];
  }
}
