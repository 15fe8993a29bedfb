// Lets a C++ compiler build qrnn.cu and run its kernels on the CPU, one thread after the other. g++ 12 or newer.
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__
#define __device__

extern "C" {
long long exp_calls = 0;  // for a test to see how much was calculated
}
template <typename A>
static inline A exp(A x) { ++exp_calls; return std::exp(x); }  // for float as well as double, as in CUDA

struct Index { long long x; };
static Index gridDim, blockDim, blockIdx, threadIdx;

static inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
static inline unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
static inline float half_to_float(unsigned short bits) { _Float16 x; std::memcpy(&x, &bits, 2); return x; }
static inline unsigned short float_to_half(float from) {
  _Float16 x = (_Float16)from;
  unsigned short bits;
  std::memcpy(&bits, &x, 2);
  return bits;
}

// What a kernel declares, a letter per parameter: p a pointer, i a 64-bit integer, ? anything else.
template <typename... P>
int describe(void (*)(P...), char* letters) {
  int n = 0;
  ((letters[n++] = std::is_pointer<P>::value ? 'p' : std::is_integral<P>::value && sizeof(P) == 8 ? 'i' : '?'), ...);
  return n;
}

// Runs a kernel over a grid; arguments as cuLaunchKernel takes them, an address each.
template <typename... P, std::size_t... I>
void run(void (*kernel)(P...), long long grid, long long block, void** arguments, std::index_sequence<I...>) {
  gridDim.x = grid;
  blockDim.x = block;
  for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < block; ++threadIdx.x) kernel(*(P*)arguments[I]...);
}
template <typename... P>
void launch(void (*kernel)(P...), long long grid, long long block, void** arguments) {
  run(kernel, grid, block, arguments, std::index_sequence_for<P...>());
}

// To be written after the text, a line for each kernel.
#define EXPORT(NAME)                                                                      \
  extern "C" int describe_##NAME(char* letters) { return describe(NAME, letters); }       \
  extern "C" void launch_##NAME(long long grid, long long block, void** arguments) {      \
    launch(NAME, grid, block, arguments);                                                 \
  }
