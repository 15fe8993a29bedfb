// Lets a C++ compiler build persistent.cu and run its kernels on the CPU with a fiber per CUDA thread. g++ 12 or newer.
//
// A fiber runs until it has to wait: for its warp (mma), its block (__syncthreads) or other blocks (arrived). Which one
// runs next depends on `order`. With 0 they take turns. With another number the threads are shuffled, and blocks and
// warps run at very different paces, so that the result is wrong if the text leaves out a barrier. Shared memory is NaN
// until it is written to.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __syncthreads() meet(current->block->gate)
#define __syncwarp()
#define __expf std::exp
#define SHARED_FLOATS(name) float* const name = current->block->shared.data()
#define blockIdx (current->block->index)
#define threadIdx (current->index)

struct uint2 { unsigned x, y; };
struct Index { unsigned x; };
struct Gate { int size = 0, here = 0; long generation = 0; };  // opens when as many as `size` are here
struct Warp { Gate gate; long pace = 1; float a[2][32][8], b[2][32][4]; };
struct Block { Index index; Gate gate; long pace = 1; std::vector<float> shared; std::vector<Warp> warps; };
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Index index;
  Block* block;
  Warp* warp;
  Gate* gate = nullptr;  // that it waits for
  long generation = 0, products = 0;
  bool done = false;
};
static Fiber* current;
static ucontext_t scheduler;
static Index gridDim;
static std::function<void()> body;

static void pause() { swapcontext(&current->context, &scheduler); }
static void meet(Gate& gate) {
  if (++gate.here == gate.size) {
    gate.here = 0, ++gate.generation;
    return;
  }
  current->gate = &gate, current->generation = gate.generation;
  pause();
  current->gate = nullptr;
}

static float from_half(unsigned bits) {
  const unsigned short low = bits;
  _Float16 x;
  std::memcpy(&x, &low, 2);
  return x;
}
static unsigned short to_half(float from) {
  const _Float16 x = from;
  unsigned short bits;
  std::memcpy(&bits, &x, 2);
  return bits;
}
static unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
static float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }

// The layout of the fragments is that of PTX's m16n8k16 for half precision.
static void mma(float (&sums)[4], const unsigned (&a)[4], uint2 b) {
  Warp& warp = *current->warp;
  const int lane = threadIdx.x % 32, turn = current->products++ % 2;  // two turns: nobody writes what another one reads
  for (int i = 0; i < 8; ++i) warp.a[turn][lane][i] = from_half(a[i / 2] >> 16 * (i % 2));
  for (int i = 0; i < 4; ++i) warp.b[turn][lane][i] = from_half((i < 2 ? b.x : b.y) >> 16 * (i % 2));
  meet(warp.gate);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const float* x = warp.a[turn][row % 8 * 4 + k % 8 / 2];
      const float* y = warp.b[turn][column * 4 + k % 8 / 2];
      sums[i] += x[(k / 8 * 2 + row / 8) * 2 + k % 2] * y[k / 8 * 2 + k % 2];
    }
  }
}
static uint2 load_shared_by_all(const uint2* from) { return *from; }
static void store_shared_by_all(unsigned short* to, unsigned short x) { *to = x; }
static void prefetch(const float* from) { (void)*(const volatile float*)from; }
static void arrive(unsigned* count) { ++*count; }
static unsigned arrived(const unsigned* count) { pause(); return *count; }

static void enter() {
  body();
  current->done = true;
  pause();
}

// Runs all threads to their ends. Returns whether they came there: a text whose barriers do not fit hangs.
static bool run_all(std::vector<std::unique_ptr<Fiber>>& fibers) {
  size_t left = fibers.size();
  for (long round = 0; left && round < 2000000; ++round) {
    for (auto& fiber : fibers) {
      if (fiber->done || (fiber->gate && fiber->gate->generation == fiber->generation)) continue;
      if (round % fiber->block->pace || round / fiber->block->pace % fiber->warp->pace) continue;
      current = fiber.get();
      swapcontext(&scheduler, &fiber->context);
      left -= fiber->done;
    }
  }
  return left == 0;
}
static bool run_grid(int grid, int threads, int shared_bytes, unsigned order) {
  const size_t stack = 1 << 15;
  const long paces[] = {1, 2, 5, 30};
  std::mt19937 random(order);
  const auto pace = [&] { return order ? paces[random() % 4] : 1; };
  gridDim.x = grid;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Fiber>> fibers;
  for (int i = 0; i < grid; ++i) {
    blocks.emplace_back(new Block);
    Block& block = *blocks.back();
    block.index.x = i, block.gate.size = threads, block.pace = pace();
    block.shared.assign(shared_bytes / 4, NAN), block.warps.resize(threads / 32);
    for (Warp& warp : block.warps) warp.gate.size = 32, warp.pace = pace();
    for (int thread = 0; thread < threads; ++thread) {
      fibers.emplace_back(new Fiber);
      Fiber& fiber = *fibers.back();
      fiber.index.x = thread, fiber.block = &block, fiber.warp = &block.warps[thread / 32];
      fiber.stack.reset(new char[stack]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = stack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, enter, 0);
    }
  }
  if (order) std::shuffle(fibers.begin(), fibers.end(), random);
  return run_all(fibers);
}

// What a kernel declares, a letter per parameter: p a pointer, i a 64-bit integer, f a float, ? anything else.
template <typename P>
constexpr char letter() {
  return std::is_pointer<P>::value ? 'p' : std::is_same<P, long long>::value ? 'i' : std::is_same<P, float>::value ? 'f' : '?';
}
template <typename... P>
int describe(void (*)(P...), char* letters) {
  int n = 0;
  ((letters[n++] = letter<P>()), ...);
  return n;
}
template <typename... P, std::size_t... I>
void set_body(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
  body = [=] { kernel(*(P*)arguments[I]...); };
}
template <typename... P>
bool launch(void (*kernel)(P...), int grid, int threads, int shared_bytes, unsigned order, void** arguments) {
  set_body(kernel, arguments, std::index_sequence_for<P...>());
  return run_grid(grid, threads, shared_bytes, order);
}

// To be written after the text, a line for each kernel. Arguments as cuLaunchKernel takes them, an address each.
#define EXPORT(NAME)                                                                                         \
  extern "C" int describe_##NAME(char* letters) { return describe(NAME, letters); }                          \
  extern "C" bool launch_##NAME(int grid, int threads, int shared_bytes, unsigned order, void** arguments) { \
    return launch(NAME, grid, threads, shared_bytes, order, arguments);                                      \
  }
