// ForgetMult on a GPU, with all that is pointwise in a QRNN layer.
// Bradbury et al., arXiv 1611.01576, section 2; formulas at the top of qrnn.py, launches in qrnn_cuda.py.
//
// One thread walks one lane, a (batch, feature) pair, over time. Neighbouring threads have neighbouring
// features, so the loads and stores of a warp are coalesced; the state stays in a register. Any T, B and H, any
// grid and block: a thread goes on with the next lane that no other thread has.
//
// S is the type in memory (float, double, half, bfloat16), A the type of the arithmetic and of the carried
// state (double for double, else float). c0 may be null: zeros.
//
// What these kernels cost is memory traffic. Numbers of S read and written per step and lane, beside what the
// same costs in separate passes:
//
//                   apart                                              here
//     forward       tanh 2, sigmoids 4, recurrence 3, o*c 3    = 12    read z f o, write out c             = 5
//     backward      o*c 5, recurrence 6, activations 9,        = 26    read g z f o c, write dz df do      = 8
//                   joining dz, df, do to dY 6
//     both          38, in float 152 bytes                             13, in float 52 bytes: 2.9 times less
//
// The backward pass calculates the activations again instead of reading them. No header is included: NVRTC
// then needs none, and a C++ compiler can build this text against a shim (tests/cuda_shim.h).

typedef long long i64;

struct half_t { unsigned short bits; };
struct bfloat16_t { unsigned short bits; };

#ifdef __CUDACC__  // a C++ compiler's shim brings its own
__device__ inline float half_to_float(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
__device__ inline unsigned short float_to_half(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif

__device__ inline float load(float x) { return x; }
__device__ inline double load(double x) { return x; }
__device__ inline float load(half_t x) { return half_to_float(x.bits); }
__device__ inline float load(bfloat16_t x) { return __uint_as_float((unsigned)x.bits << 16); }

__device__ inline void store(float* to, float x) { *to = x; }
__device__ inline void store(double* to, double x) { *to = x; }
__device__ inline void store(half_t* to, float x) { to->bits = float_to_half(x); }
__device__ inline void store(bfloat16_t* to, float x) {
  unsigned bits = __float_as_uint(x);
  bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  // to the nearest, ties to even, as torch rounds; the addition would carry a NaN over into infinity or zero
  to->bits = (unsigned short)(is_nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <typename A>
__device__ inline A sigmoid(A x) { return A(1) / (A(1) + exp(-x)); }
// Within 2e-7 of tanh in float, as in qrnn.py, and without tanh's branch: loads are moved up over it.
template <typename A>
__device__ inline A tanh_of(A x) { return A(2) * sigmoid(A(2) * x) - A(1); }

#define FOR_EACH_LANE(lane, lanes)                                                            \
  for (i64 lane = (i64)blockIdx.x * blockDim.x + threadIdx.x; lane < (lanes);                 \
       lane += (i64)gridDim.x * blockDim.x)

// Lanes are few (31,000 for the published model, 235 to a processor of an H100) and steps follow each other, so
// that it takes many loads under way per thread to keep the memory busy. Those of AHEAD steps are therefore asked
// for before the first of them is looked at; left to itself the compiler waits for each step's. (On an H100 the
// backward pass of that model's layer, 70 x 31,000 lanes of float, takes 35 us for 89; of bfloat16 33 for 98.)
#define AHEAD (sizeof(S) > 4 ? 4 : 8)  // steps, in up to 168 registers
#define FOR_EACH_STEP(k) _Pragma("unroll") for (int k = 0; k < AHEAD; ++k)

// y (T, B, 3H), z, f, o side by side -> out, c (T, B, H); c0 -> c_last (B, H).
template <typename S, typename A>
__device__ inline void forget_mult_forward(const S* y, const A* c0, S* out, S* c, A* c_last,
                                           i64 T, i64 B, i64 H) {
  const i64 lanes = B * H;
  FOR_EACH_LANE(lane, lanes) {
    const S* from = y + lane / H * 3 * H + lane % H;  // y_z of this lane at step 0; y_f is H further
    A state = c0 ? c0[lane] : A(0);
    for (i64 start = 0; start < T; start += AHEAD) {
      S y_z[AHEAD], y_f[AHEAD], y_o[AHEAD];
      FOR_EACH_STEP(k) {
        const i64 t = start + k < T ? start + k : T - 1;  // past the end: any, without a branch
        const S* at = from + t * 3 * lanes;
        y_z[k] = at[0], y_f[k] = at[H], y_o[k] = at[2 * H];
      }
      FOR_EACH_STEP(k) if (start + k < T) {
        const A z = tanh_of(load(y_z[k])), f = sigmoid(load(y_f[k])), o = sigmoid(load(y_o[k]));
        const i64 i = (start + k) * lanes + lane;
        state = f * z + (A(1) - f) * state;
        store(&c[i], state);
        store(&out[i], o * state);
      }
    }
    c_last[lane] = state;
  }
}

// g_out (T, B, H), g_last (B, H): the gradients of out and c_last; y, c, c0 as above -> dy (T, B, 3H), dc0 (B, H).
template <typename S, typename A>
__device__ inline void forget_mult_backward(const S* g_out, const A* g_last, const S* y, const S* c,
                                            const A* c0, S* dy, A* dc0, i64 T, i64 B, i64 H) {
  const i64 lanes = B * H;
  FOR_EACH_LANE(lane, lanes) {
    const i64 first = lane / H * 3 * H + lane % H;
    const A c_first = c0 ? c0[lane] : A(0);
    A dc = g_last[lane];
    A c_t = load(c[(T - 1) * lanes + lane]);
    for (i64 start = T - 1; start >= 0; start -= AHEAD) {
      S y_z[AHEAD], y_f[AHEAD], y_o[AHEAD], g_t[AHEAD], c_before[AHEAD];
      FOR_EACH_STEP(k) {
        const i64 t = start > k ? start - k : 0;  // before the beginning: any
        const S* at = y + first + t * 3 * lanes;
        y_z[k] = at[0], y_f[k] = at[H], y_o[k] = at[2 * H];
        g_t[k] = g_out[t * lanes + lane];
        c_before[k] = c[(t > 0 ? t - 1 : 0) * lanes + lane];
      }
      FOR_EACH_STEP(k) if (start >= k) {
        const A z = tanh_of(load(y_z[k])), f = sigmoid(load(y_f[k])), o = sigmoid(load(y_o[k]));
        const A g = load(g_t[k]), before = start > k ? load(c_before[k]) : c_first;
        S* to = dy + first + (start - k) * 3 * lanes;
        dc += g * o;
        store(&to[0], dc * f * (A(1) - z * z));
        store(&to[H], dc * (z - before) * f * (A(1) - f));
        store(&to[2 * H], g * c_t * o * (A(1) - o));
        dc *= A(1) - f;
        c_t = before;
      }
    }
    dc0[lane] = dc;
  }
}

// The kernels by name and type: forget_mult_forward_float, ..., forget_mult_backward_bfloat16. `__restrict__`
// here, on the kernel's own parameters, is what lets the compiler move loads above earlier stores.
#define IN(type, name) const type *__restrict__ name
#define OUT(type, name) type *__restrict__ name
#define KERNELS(NAME, S, A)                                                                                  \
  extern "C" __global__ void forget_mult_forward_##NAME(IN(S, y), IN(A, c0), OUT(S, out), OUT(S, c),         \
                                                        OUT(A, c_last), i64 T, i64 B, i64 H) {               \
    forget_mult_forward<S, A>(y, c0, out, c, c_last, T, B, H);                                               \
  }                                                                                                          \
  extern "C" __global__ void forget_mult_backward_##NAME(IN(S, g_out), IN(A, g_last), IN(S, y), IN(S, c),    \
                                                         IN(A, c0), OUT(S, dy), OUT(A, dc0), i64 T, i64 B,   \
                                                         i64 H) {                                            \
    forget_mult_backward<S, A>(g_out, g_last, y, c, c0, dy, dc0, T, B, H);                                   \
  }

KERNELS(float, float, float)
KERNELS(double, double, double)
KERNELS(half, half_t, float)
KERNELS(bfloat16, bfloat16_t, float)
