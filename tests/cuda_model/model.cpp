#include "model.h"

#include <csignal>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

thread_local uint3 threadIdx, blockIdx;
thread_local dim3 blockDim, gridDim;

// Where the linker has put all `__shared__` variables; null where there are none.
extern "C" char __start_block_shared[] __attribute__((weak)), __stop_block_shared[] __attribute__((weak));

// The thread sanitizer's, where it watches: what a thread does in between is none of its business.
extern "C" {
void AnnotateIgnoreSyncBegin(const char* file, int line) __attribute__((weak));
void AnnotateIgnoreSyncEnd(const char* file, int line) __attribute__((weak));
void AnnotateIgnoreReadsBegin(const char* file, int line) __attribute__((weak));
void AnnotateIgnoreReadsEnd(const char* file, int line) __attribute__((weak));
void AnnotateIgnoreWritesBegin(const char* file, int line) __attribute__((weak));
void AnnotateIgnoreWritesEnd(const char* file, int line) __attribute__((weak));
}

namespace model {

int cluster = 1;
cudaError_t last_error = cudaSuccess;
Copies copies = ANY;

namespace {

constexpr int MOST_BLOCKS = 2; // of a cluster
constexpr uint32_t BEGIN = 16; // of a block's shared memory: nothing says that it is aligned to more
constexpr int WINDOW = 256 << 10, MOST_SHARED = 232448;
constexpr int FOUR_WARPS = 128;

// --- What can still happen. A thread that waits is woken by the one that lets it go on, which counts it as active again before
// it can end or wait itself: so none is left only when nothing will ever happen. Relaxed, that the sanitizer does not take
// the counting for an order between threads.

std::atomic<int> active; // threads that do not wait, and copies under way
std::atomic<int> under_way; // copies
std::atomic<int> ended; // threads
std::atomic<int> elsewhere; // threads that wait for other clusters
int started;

// What the processes of a launch know of each other; a launch of one cluster has one.
struct Together {
  static constexpr int MOST = 64;
  std::atomic<int> idle[MOST]; // whether nothing happens in a process any more, but by others
  std::atomic<int> most_steps;
};
Together& together() {
  static Together* const one = new (map_shared(sizeof(Together))) Together{};
  return *one;
}
int process, processes = 1; // this one's number, and how many there are
std::atomic<int> steps; // of the products of one thread of a cluster

std::vector<std::atomic<const char*>> waits_for; // each thread, if it waits

void nothing_happens() {
  std::map<std::string, int> counts;
  for (const auto& what : waits_for) {
    if (const char* name = what.load(std::memory_order_relaxed)) {
      ++counts[name];
    }
  }
  std::string text;
  for (const auto& [name, count] : counts) {
    text += (text.empty() ? "" : ", ") + std::to_string(count) + " for " + name;
  }
  fail("deadlock: of %d threads %d have ended and the others wait, %s", started, ended.load(), text.c_str());
}

void tell_engine();

// One less is active.
void rest() {
  const int left = active.fetch_sub(1, std::memory_order_relaxed) - 1;
  if (left == 0 && ended.load(std::memory_order_relaxed) < started && elsewhere.load(std::memory_order_relaxed) == 0) {
    nothing_happens();
  }
  if (copies == LATE && left == under_way.load(std::memory_order_relaxed)) {
    tell_engine();
  }
}

thread_local int number; // of this thread, in its cluster

// What threads wait at, with `lock` held.
class Gate {
 public:
  std::mutex lock;

  template <typename Done>
  void wait(std::unique_lock<std::mutex>& held, const char* what, Done done) {
    while (!done()) {
      const unsigned before = wakings_;
      ++waiting_;
      waits_for[number].store(what, std::memory_order_relaxed);
      rest();
      changed_.wait(held, [&] { return wakings_ != before; });
      waits_for[number].store(nullptr, std::memory_order_relaxed);
    }
  }

  void wake() {
    active.fetch_add(waiting_, std::memory_order_relaxed);
    waiting_ = 0;
    ++wakings_;
    changed_.notify_all();
  }

 private:
  std::condition_variable changed_;
  int waiting_ = 0;
  unsigned wakings_ = 0;
};

// All of so many threads, again and again.
class Barrier : Gate {
 public:
  void pass(unsigned threads, const char* what) {
    std::unique_lock<std::mutex> held(lock);
    if (arrived_ > 0 && threads != expected_) {
      fail("threads wait for %u and for %u others at %s", expected_, threads, what);
    }
    expected_ = threads;
    if (++arrived_ == threads) {
      arrived_ = 0;
      ++passed_;
      wake();
    } else {
      const unsigned before = passed_;
      wait(held, what, [&] { return passed_ != before; });
    }
  }

 private:
  unsigned expected_ = 0, arrived_ = 0, passed_ = 0;
};

struct Mbarrier : Gate {
  int count, pending;
  long bytes = 0; // expected and not there
  unsigned phase = 0;

  explicit Mbarrier(int count) : count(count), pending(count) {}

  void add(int arrivals, long more) {
    const std::lock_guard<std::mutex> held(lock);
    pending -= arrivals;
    bytes += more;
    if (pending < 0) {
      fail("an mbarrier has more arrivals in a phase than the %d that it is for", count);
    }
    if (pending == 0 && bytes == 0) {
      pending = count;
      ++phase;
      wake();
    }
  }
};

struct Warp {
  Barrier barrier;
  unsigned lanes = 32; // the last of a block may have fewer
  uint32_t values[2][32]; // by turns: who reads one is done when the barrier behind the other lets anybody pass
};

struct Block {
  Barrier all, named[16]; // `all` is the first of these to a GPU; none of the kernels uses it under both names
  Barrier products[8]; // of each four warps
  std::vector<Warp> warps;
  std::vector<std::atomic<Mbarrier*>> mbarriers{WINDOW / 8};
  std::atomic<int> threads; // that have not ended
  ~Block() {
    for (auto& mbarrier : mbarriers) {
      delete mbarrier.load();
    }
  }
};

alignas(1024) char memory[MOST_BLOCKS][WINDOW];
size_t shared_bytes;
std::unique_ptr<Block> blocks[MOST_BLOCKS];
std::unique_ptr<Barrier> whole_cluster;

struct Copy {
  uint32_t to;
  const void* from;
};
struct Product {
  float (*d)[128];
  uint64_t rows, columns;
  bool adds, bf16, turned;
};
struct Stores : Gate {
  int left = 0, unread = 0;
};

// What a thread has under way, the last group not committed.
struct Thread {
  uint32_t block;
  int number, turn = 0; // in its block
  std::deque<std::vector<Copy>> copies{1};
  std::deque<std::vector<Product>> products{1};
  std::deque<std::shared_ptr<Stores>> stores{std::make_shared<Stores>()};
};
thread_local Thread* me;

// --- The copy engine.

std::mutex queue_lock;
std::condition_variable queue_changed;
std::vector<std::function<void()>> queue;
bool engine_ends;

void tell_engine() {
  const std::lock_guard<std::mutex> held(queue_lock);
  queue_changed.notify_all();
}

void have_copied(std::function<void()> copy) {
  if (copies == EARLY) {
    copy();
    return;
  }
  active.fetch_add(1, std::memory_order_relaxed);
  under_way.fetch_add(1, std::memory_order_relaxed);
  const std::lock_guard<std::mutex> held(queue_lock);
  queue.push_back(std::move(copy));
  queue_changed.notify_one();
}

void run_engine(unsigned seed) {
  std::mt19937 random(seed);
  for (;;) {
    std::function<void()> copy;
    {
      std::unique_lock<std::mutex> held(queue_lock);
      queue_changed.wait(held, [] {
        const bool may = copies == ANY || (active.load(std::memory_order_relaxed) == static_cast<int>(queue.size()) &&
                                           ended.load(std::memory_order_relaxed) < started);
        return engine_ends || (!queue.empty() && may);
      });
      if (engine_ends) {
        return;
      }
      const size_t which = random() % queue.size();
      copy = std::move(queue[which]);
      queue.erase(queue.begin() + static_cast<ptrdiff_t>(which));
    }
    for (unsigned i = copies == ANY ? random() % 8 : 0; i > 0; --i) {
      std::this_thread::yield();
    }
    copy();
    under_way.fetch_sub(1, std::memory_order_relaxed);
    rest();
  }
}

// --- Tensors and tiles: rows of 128 bytes, whose 16-byte parts are permuted in each 8 rows.

struct Map {
  char* data;
  int64_t rows, columns; // elements of 2 bytes
  int tall;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

constexpr int WIDE = 64; // elements of a tile's row

CUresult encode(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* sizes, const cuuint64_t* strides,
    const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  if ((type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 && type != CU_TENSOR_MAP_DATA_TYPE_FLOAT16) || rank != 2 || box[0] != WIDE ||
      steps[0] != 1 || steps[1] != 1 || strides[0] != 2 * sizes[0] || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
      swizzle != CU_TENSOR_MAP_SWIZZLE_128B || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) {
    fail("the model knows copies of contiguous matrices of 16-bit floats, in swizzled tiles of 128 bytes");
  }
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || strides[0] % 16 != 0 || sizes[0] == 0 || sizes[1] == 0 || box[1] == 0 ||
      box[1] > 256) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const Map known{static_cast<char*>(data), static_cast<int64_t>(sizes[1]), static_cast<int64_t>(sizes[0]),
                  static_cast<int>(box[1])};
  memcpy(map, &known, sizeof known);
  return CUDA_SUCCESS;
}

// `use(in_tile, in_tensor)` for each 16 bytes; null where that is outside of the tensor.
template <typename Use>
void each_part(const Map& map, uint32_t tile, int x, int y, const Use& use) {
  for (int row = 0; row < map.tall; ++row) {
    for (int part = 0; part < 8; ++part) {
      const int64_t down = static_cast<int64_t>(y) + row, across = static_cast<int64_t>(x) + 8 * part;
      const bool inside = down >= 0 && down < map.rows && across >= 0 && across < map.columns;
      use(shared_at(tile + row * 128 + (part ^ row % 8) * 16, 16),
          inside ? map.data + (down * map.columns + across) * 2 : nullptr);
    }
  }
}

Map known(const CUtensorMap* map, uint32_t tile) {
  if (tile % 1024 != 0) {
    fail("a tile in shared memory is at %u: not at a multiple of 1024 bytes", tile);
  }
  Map of;
  memcpy(&of, map, sizeof of);
  return of;
}

Mbarrier& mbarrier_at(uint32_t address) {
  const uint32_t there = address_in(address % OTHER, address < OTHER ? me->block : address / OTHER - 1);
  shared_at(there, 8);
  Mbarrier* const found = blocks[there / OTHER - 1]->mbarriers[there % OTHER / 8].load(std::memory_order_relaxed);
  if (there % 8 != 0 || found == nullptr) {
    fail("no mbarrier was initialised at %u", there);
  }
  return *found;
}

// --- Products. Threads of a GPU do not wait for each other where they wait for the tensor cores; these do, because each is a
// part of what those are. It is kept from the sanitizer, to which it would be an order between what the threads do themselves.
class Unwatched {
 public:
  Unwatched() {
    if (AnnotateIgnoreSyncBegin != nullptr) {
      AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
      AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
      AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    }
  }
  ~Unwatched() {
    if (AnnotateIgnoreSyncBegin != nullptr) {
      AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
      AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
      AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
    }
  }
};

// Of the operands' tiles 16 elements of a row.

void sixteen(float (&to)[16], uint64_t descriptor, int row, bool bf16) {
  for (int half = 0; half < 2; ++half) {
    uint32_t at = static_cast<uint32_t>(descriptor & 0x3fff) * 16 + row * 128 + half * 16;
    at ^= (at >> 7 & 7) << 4;
    uint16_t bits[8];
    memcpy(bits, shared_at(at, 16), 16);
    for (int i = 0; i < 8; ++i) {
      to[8 * half + i] = bf16 ? float_of(static_cast<uint32_t>(bits[i]) << 16) : __half2float(__half_raw{bits[i]});
    }
  }
}

// The same of an operand whose rows are steps: 64 of its columns lie beside each other, and the next 64 behind all steps.
void sixteen_turned(float (&to)[16], uint64_t descriptor, int column, bool bf16) {
  const uint32_t begin = static_cast<uint32_t>(descriptor & 0x3fff) * 16, next = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) * 16;
  for (int step = 0; step < 16; ++step) {
    uint32_t at = begin + column / 64 * next + step * 128 + column % 64 * 2;
    at ^= (at >> 7 & 7) << 4;
    uint16_t bits;
    memcpy(&bits, shared_at(at, 2), 2);
    to[step] = bf16 ? float_of(static_cast<uint32_t>(bits) << 16) : __half2float(__half_raw{bits});
  }
}

// A thread has two rows, 8 apart, and of each 8 columns two.
void multiply_now(const Product& product) {
  const int thread = me->number % FOUR_WARPS, row = thread / 32 * 16 + thread % 32 / 4;
  float x[2][16], w[16];
  sixteen(x[0], product.rows, row, product.bf16);
  sixteen(x[1], product.rows, row + 8, product.bf16);
  for (int eight = 0; eight < 32; ++eight) {
    for (int column = 0; column < 2; ++column) {
      (product.turned ? sixteen_turned : sixteen)(w, product.columns, 8 * eight + thread % 4 * 2 + column, product.bf16);
      for (int below = 0; below < 2; ++below) {
        float& to = (*product.d)[4 * eight + 2 * below + column];
        float sum = product.adds ? to : 0.0f;
        for (int k = 0; k < 16; ++k) {
          sum += x[below][k] * w[k];
        }
        to = sum;
      }
    }
  }
}

void check_end() {
  if (me->copies.size() > 1 || !me->copies.back().empty()) {
    fail("a thread ends before its copies into shared memory");
  }
  if (me->products.size() > 1 || !me->products.back().empty()) {
    fail("a thread ends before its products");
  }
  if (me->stores.size() > 1 || me->stores.back()->left > 0) {
    fail("a thread ends before what it has written from shared memory");
  }
}

std::map<const void*, int> allowed; // bytes of shared memory

} // namespace

void fail(const char* format, ...) {
  static std::mutex once;
  once.lock(); // for good
  va_list arguments;
  va_start(arguments, format);
  fputs("model: ", stderr);
  vfprintf(stderr, format, arguments);
  fputs("\n", stderr);
  va_end(arguments);
  fflush(nullptr);
  _exit(3);
}

cudaError_t allow_shared(const void* kernel, cudaFuncAttribute attribute, int bytes) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || bytes > MOST_SHARED) {
    return cudaErrorInvalidValue;
  }
  allowed[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t entry_point(const char* name, void** function, unsigned long long, cudaDriverEntryPointQueryResult* found) {
  const bool known = std::string(name) == "cuTensorMapEncodeTiled";
  *function = known ? reinterpret_cast<void*>(static_cast<decltype(&cuTensorMapEncodeTiled)>(encode)) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

void in_cluster_of(int size) {
  if (size != cluster) {
    fail("a kernel for clusters of %d blocks runs in one of %d", size, cluster);
  }
}

namespace {

void run_cluster(const Grid& grid, unsigned first, int cluster, const std::function<void()>& thread) {
  const unsigned threads = grid.threads.x * grid.threads.y;
  memset(memory, 0xff, sizeof memory); // NaN
  memset(__start_block_shared, 0xff, static_cast<size_t>(&__stop_block_shared[0] - &__start_block_shared[0]));
  for (int block = 0; block < cluster; ++block) {
    blocks[block] = std::make_unique<Block>();
    blocks[block]->warps = std::vector<Warp>((threads + 31) / 32);
    blocks[block]->warps.back().lanes = (threads - 1) % 32 + 1;
    blocks[block]->threads = static_cast<int>(threads);
  }
  whole_cluster = std::make_unique<Barrier>();
  waits_for = std::vector<std::atomic<const char*>>(started);
  active = started;
  under_way = 0;
  ended = 0;
  engine_ends = false;
  steps = 0;
  std::vector<std::thread> engines, all;
  for (unsigned seed = 0; seed < (copies == ANY ? 3 : copies == LATE ? 1 : 0); ++seed) {
    engines.emplace_back(run_engine, 8 * first + seed);
  }
  for (int of_cluster = 0; of_cluster < started; ++of_cluster) {
    all.emplace_back([&, of_cluster] {
      Thread mine;
      number = of_cluster;
      mine.block = of_cluster / threads;
      mine.number = of_cluster % static_cast<int>(threads);
      me = &mine;
      const unsigned block = first + mine.block;
      threadIdx = {mine.number % grid.threads.x, mine.number / grid.threads.x, 0};
      blockIdx = {block % grid.blocks.x, block / grid.blocks.x, 0};
      blockDim = grid.threads;
      gridDim = grid.blocks;
      thread();
      check_end();
      blocks[mine.block]->threads.fetch_sub(1, std::memory_order_relaxed);
      ended.fetch_add(1, std::memory_order_relaxed);
      rest();
    });
  }
  for (auto& one : all) {
    one.join();
  }
  {
    const std::lock_guard<std::mutex> held(queue_lock);
    engine_ends = true;
    queue_changed.notify_all();
  }
  for (auto& one : engines) { // each ends what it is at, of which threads may know before it has counted it
    one.join();
  }
  if (!queue.empty()) {
    fail("the blocks end before %zu copies", queue.size());
  }
  for (int most = together().most_steps; most < steps && !together().most_steps.compare_exchange_weak(most, steps);) {
  }
}

// Each in a process of its own. One that fails has said why.
void run_together(const Grid& grid, int cluster, const std::function<void()>& thread) {
  const pid_t parent = getpid();
  std::vector<pid_t> started;
  processes = static_cast<int>(grid.blocks.x * grid.blocks.y) / cluster;
  if (processes > Together::MOST) {
    fail("%d clusters at the same time", processes);
  }
  fflush(nullptr);
  for (process = 0; process < processes; ++process) {
    together().idle[process] = 0;
    const pid_t one = fork();
    if (one == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (getppid() != parent) {
        _exit(1);
      }
      run_cluster(grid, static_cast<unsigned>(process * cluster), cluster, thread);
      together().idle[process] = 1;
      fflush(nullptr);
      _exit(0);
    }
    if (one < 0) {
      fail("no process for a cluster");
    }
    started.push_back(one);
  }
  process = 0;
  for (size_t left = started.size(); left > 0; --left) {
    int status = 0;
    wait(&status);
    if (status != 0) {
      for (const pid_t one : started) {
        kill(one, SIGKILL);
      }
      _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 1);
    }
  }
  processes = 1;
}

} // namespace

void run(const Grid& grid, int cluster, bool at_once, const void* kernel, const std::function<void()>& thread) {
  const unsigned threads = grid.threads.x * grid.threads.y, most = allowed.count(kernel) ? allowed[kernel] : 48 << 10;
  if (threads == 0 || threads > 1024 || grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.y > 65535 ||
      grid.blocks.x % cluster != 0 || grid.threads.z != 1 || grid.blocks.z != 1) {
    fail("no launch: %u x %u blocks of %u x %u threads", grid.blocks.x, grid.blocks.y, grid.threads.x, grid.threads.y);
  }
  if (grid.shared > most) {
    fail("a launch with %zu bytes of shared memory, of a kernel that may have %u", grid.shared, most);
  }
  const ptrdiff_t variables = &__stop_block_shared[0] - &__start_block_shared[0];
  if (cluster > MOST_BLOCKS || (cluster > 1 && variables > 0)) {
    fail("the model knows clusters of %d blocks, without static shared memory", MOST_BLOCKS);
  }
  shared_bytes = grid.shared;
  started = static_cast<int>(threads) * cluster;
  together().most_steps = 0;
  if (at_once && grid.blocks.x * grid.blocks.y > static_cast<unsigned>(cluster)) {
    run_together(grid, cluster, thread);
    return;
  }
  for (unsigned first = 0; first < grid.blocks.x * grid.blocks.y; first += cluster) {
    run_cluster(grid, first, cluster, thread);
  }
}

void* map_shared(size_t bytes) {
  void* const at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) {
    fail("no memory");
  }
  return at;
}

void unmap_shared(void* at, size_t bytes) { munmap(at, bytes); }

// --- Shared memory

void* shared_memory() { return memory[me->block] + BEGIN; }

uint32_t shared_address(const void* at) {
  const ptrdiff_t place = static_cast<const char*>(at) - memory[me->block];
  if (place < BEGIN || place >= WINDOW) {
    fail("an address in shared memory of what is not there, or static");
  }
  return static_cast<uint32_t>(place);
}

uint32_t address_in(uint32_t address, uint32_t block) {
  if (address >= OTHER || block >= static_cast<uint32_t>(cluster)) {
    fail("address %u in block %u of the cluster", address, block);
  }
  return (block + 1) * OTHER + address;
}

char* shared_at(uint32_t address, int bytes) {
  const uint32_t place = address % OTHER, block = address < OTHER ? me->block : address / OTHER - 1;
  if (place < BEGIN || place + bytes > BEGIN + shared_bytes) {
    fail("%d bytes at %u of shared memory, which has %zu from %u on", bytes, place, shared_bytes, BEGIN);
  }
  if (address >= OTHER && blocks[block]->threads.load(std::memory_order_relaxed) == 0) {
    fail("shared memory of a block that has ended");
  }
  return memory[block] + place;
}

// --- Threads

uint32_t block_in_cluster() { return me->block; }

void named_barrier(unsigned number, unsigned threads) {
  if (number > 15 || threads % 32 != 0 || threads == 0) {
    fail("no barrier: number %u, for %u threads", number, threads);
  }
  blocks[me->block]->named[number].pass(threads, "a named barrier");
}

void cluster_barrier() { whole_cluster->pass(started, "the cluster's barrier"); }

void block_barrier() { blocks[me->block]->all.pass(blockDim.x * blockDim.y, "a barrier of the block"); }

namespace {

// What each lane of the warp has.
const uint32_t (&of_warp(uint32_t value))[32] {
  Warp& warp = blocks[me->block]->warps[me->number / 32];
  uint32_t(&values)[32] = warp.values[me->turn];
  me->turn ^= 1;
  values[me->number % 32] = value;
  warp.barrier.pass(warp.lanes, "a warp's shuffle or vote");
  return values;
}
unsigned lanes() { return blocks[me->block]->warps[me->number / 32].lanes; }

} // namespace

uint32_t exchange(uint32_t value, int offset) {
  const unsigned other = me->number % 32 ^ offset;
  const uint32_t got = of_warp(value)[other % 32];
  if (other >= lanes()) {
    fail("a shuffle with lane %u, which there is not", other);
  }
  return got;
}

bool any(bool value) {
  const auto& values = of_warp(value);
  return std::any_of(values, values + lanes(), [](uint32_t one) { return one != 0; });
}

void barrier_init(uint32_t barrier, int count) {
  shared_at(barrier, 8);
  auto& place = blocks[me->block]->mbarriers[barrier / 8];
  if (barrier % 8 != 0 || count < 1 || place.load(std::memory_order_relaxed) != nullptr) {
    fail("no mbarrier: at %u for %d, or there is one", barrier, count);
  }
  place.store(new Mbarrier(count), std::memory_order_relaxed);
}

void barrier_arrive(uint32_t barrier) { mbarrier_at(barrier).add(1, 0); }

void barrier_expect(uint32_t barrier, int bytes) { mbarrier_at(barrier).add(1, bytes); }

int barrier_wait(uint32_t barrier, int parity) {
  Mbarrier& at = mbarrier_at(barrier);
  std::unique_lock<std::mutex> held(at.lock);
  at.wait(held, "an mbarrier's phase", [&] { return (at.phase & 1) != static_cast<unsigned>(parity); });
  return 1;
}

void count(int* at) { __atomic_fetch_add(at, 1, __ATOMIC_RELEASE); }

void wait_for_count(const int* at, int times) {
  constexpr int LONG = 20000; // 2 s
  waits_for[number].store("a count", std::memory_order_relaxed);
  elsewhere.fetch_add(1, std::memory_order_relaxed);
  rest();
  // Nothing comes any more when for so long nobody is at work in any process.
  for (int idle = 0, all_idle = 0; __atomic_load_n(at, __ATOMIC_ACQUIRE) < times;) {
    usleep(100);
    idle = active.load(std::memory_order_relaxed) == 0 ? idle + 1 : 0;
    together().idle[process] = idle > LONG;
    bool all = true;
    for (int other = 0; other < processes; ++other) {
      all = all && together().idle[other] != 0;
    }
    all_idle = all ? all_idle + 1 : 0;
    if (all_idle > LONG) {
      nothing_happens();
    }
  }
  together().idle[process] = 0;
  active.fetch_add(1, std::memory_order_relaxed);
  elsewhere.fetch_sub(1, std::memory_order_relaxed);
  waits_for[number].store(nullptr, std::memory_order_relaxed);
}

// --- Copies

void copy_16(uint32_t to, const void* from) {
  if (to % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    fail("a copy of 16 bytes that are not aligned");
  }
  char* const there = shared_at(to, 16);
  thread_local std::minstd_rand random(number + 1);
  if (copies == EARLY || (copies == ANY && random() % 2 == 0)) {
    memcpy(there, from, 16);
  } else {
    me->copies.back().push_back({to, from});
  }
}

void commit_copies() { me->copies.emplace_back(); }

void wait_for_copies(int groups) {
  while (static_cast<int>(me->copies.size()) - 1 > groups) {
    for (const Copy& copy : me->copies.front()) {
      memcpy(shared_at(copy.to, 16), copy.from, 16);
    }
    me->copies.pop_front();
  }
}

void load_tile(uint32_t to, const CUtensorMap* from, int x, int y, uint32_t barrier) {
  load_tile(to, from, x, y, barrier, static_cast<uint16_t>(1 << me->block));
}

void load_tile(uint32_t to, const CUtensorMap* from, int x, int y, uint32_t barrier, uint16_t to_blocks) {
  const Map map = known(from, to);
  std::vector<std::pair<uint32_t, Mbarrier*>> places; // in each block
  for (uint32_t block = 0; block < 16; ++block) {
    if (to_blocks >> block & 1) {
      places.emplace_back(address_in(to, block), &mbarrier_at(address_in(barrier, block)));
    }
  }
  have_copied([=] {
    for (const auto& [tile, mbarrier] : places) {
      each_part(map, tile, x, y, [](char* in_tile, const char* in_tensor) {
        if (in_tensor != nullptr) {
          memcpy(in_tile, in_tensor, 16);
        } else {
          memset(in_tile, 0, 16);
        }
      });
      mbarrier->add(0, -128L * map.tall);
    }
  });
}

void store_tile(const CUtensorMap* to, int x, int y, uint32_t from) {
  const Map map = known(to, from);
  const uint32_t tile = address_in(from, me->block);
  const std::shared_ptr<Stores> stores = me->stores.back();
  {
    const std::lock_guard<std::mutex> held(stores->lock);
    ++stores->left;
    ++stores->unread;
  }
  have_copied([=] {
    const auto parts = std::make_shared<std::vector<std::pair<char*, std::array<char, 16>>>>();
    each_part(map, tile, x, y, [&](const char* in_tile, char* in_tensor) {
      if (in_tensor != nullptr) {
        parts->emplace_back(in_tensor, std::array<char, 16>{});
        memcpy(parts->back().second.data(), in_tile, 16);
      }
    });
    have_copied([=] {
      for (const auto& [at, bytes] : *parts) {
        memcpy(at, bytes.data(), 16);
      }
      const std::lock_guard<std::mutex> held(stores->lock);
      if (--stores->left == 0) {
        stores->wake();
      }
    });
    const std::lock_guard<std::mutex> held(stores->lock);
    if (--stores->unread == 0) {
      stores->wake();
    }
  });
}

void commit_stores() { me->stores.push_back(std::make_shared<Stores>()); }

void wait_for_stores_read(int groups) {
  for (int i = 0; i < static_cast<int>(me->stores.size()) - 1 - groups; ++i) {
    const std::shared_ptr<Stores> one = me->stores[i];
    std::unique_lock<std::mutex> held(one->lock);
    one->wait(held, "what it writes from shared memory to be read", [&] { return one->unread == 0; });
  }
}

void wait_for_stores(int groups) {
  while (static_cast<int>(me->stores.size()) - 1 > groups) {
    const std::shared_ptr<Stores> first = me->stores.front();
    std::unique_lock<std::mutex> held(first->lock);
    first->wait(held, "what it writes from shared memory", [&] { return first->left == 0; });
    me->stores.pop_front();
  }
}

// --- Products

void multiply(const char* type, const char* turned, float (&d)[128], uint64_t rows, uint64_t columns, int adds) {
  const bool turns = *turned == '1';
  for (const bool second : {false, true}) {
    const uint64_t descriptor = second ? columns : rows;
    // Beside the place: 1024 bytes from eight rows to the next, 128 bytes of a row permuted; how far apart 64 columns lie that are turned.
    const uint64_t apart = second && turns ? descriptor & uint64_t{0x3fff} << 16 : uint64_t{1} << 16;
    if ((descriptor & ~uint64_t{0x3fff}) != (apart | uint64_t{1024 / 16} << 32 | uint64_t{1} << 62)) {
      fail("the model does not know operands that lie as descriptor %#llx says", static_cast<unsigned long long>(descriptor));
    }
  }
  me->products.back().push_back({&d, rows, columns, adds != 0, std::string(type) == "bf16", turns});
}

void commit_products() {
  me->products.emplace_back();
  if (me->block == 0 && me->number == FOUR_WARPS) {
    ++steps;
  }
}

int most_steps() { return together().most_steps; }

void wait_for_products(int groups) {
  const Unwatched unwatched;
  while (static_cast<int>(me->products.size()) - 1 > groups) {
    for (const Product& product : me->products.front()) {
      multiply_now(product);
    }
    me->products.pop_front();
  }
  // Done for a thread when they are for all four warps: one may tell others that the operands have been read.
  blocks[me->block]->products[me->number / FOUR_WARPS].pass(FOUR_WARPS, "its four warps' products");
}

} // namespace model
