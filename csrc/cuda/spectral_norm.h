// Spectral norm on CUDA: what a launch is told about its layers, and which part of the work each block has. Plain C++, so that
// tests can make the same tables without a GPU.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "launch.h"
#include "parameters.h"

#ifdef __CUDACC__
#define FASTGAN_BOTH __host__ __device__
#else
#define FASTGAN_BOTH
#endif

namespace fastgan::spectral_norm {

constexpr int kThreads = 256;
constexpr int64_t kTileBytes = 40 << 10;             // of a tile in shared memory: two to four blocks share a multiprocessor
constexpr int64_t kStaticShared = 128;                 // bytes, beside the tile and what goes with it
constexpr int64_t kMostOwn = 64;                     // own rows of a tile
constexpr int64_t kNarrow = 128, kMostColumns = 32;  // bytes and number of own columns of a tile, at most
constexpr int64_t kOwnRows = 32, kOwnColumns = 128;  // of a block, at least: its piece costs 2 / own of its weights' traffic,
                                                     // and twice as many where weights are of half its size
constexpr int64_t kLongRows = 16;                    // own rows where no tile holds them whole
constexpr int64_t kReduced = 64;                     // full indices of a block that adds pieces up
constexpr int64_t kStreamed = 8192;                  // elements of a block that goes through memory
constexpr int64_t kRectangleRows = 64;               // of a block that needs to know them; 32 packs of 16 bytes wide
constexpr int64_t kSums = 256;                       // blocks of a layer that share <G, W>, at most: as many sums all others read

FASTGAN_BOTH inline int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTGAN_BOTH inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// One weight, which lies in memory as (columns / run, rows, run). Neighbouring columns of memory are `columns / inner` apart in v
// where inner isn't columns (channels_last).
struct Layer {
  const void *weight, *grad, *u, *v;
  void *out, *new_u, *new_v, *sigma, *scratch;
  int32_t rows, columns, run, inner;
  int32_t own, chunk, tiles;  // own and full indices of a tile, and tiles of a block
  uint32_t first[3];          // block of the layer in each kernel

  FASTGAN_BOTH int64_t numel() const { return int64_t(rows) * columns; }
  FASTGAN_BOTH int own_count(bool v_first) const { return v_first ? columns : rows; }
  FASTGAN_BOTH int full_count(bool v_first) const { return v_first ? rows : columns; }
  FASTGAN_BOTH int product_blocks(bool v_first) const { return int(cdiv(own_count(v_first), int64_t(own) * tiles)); }
  FASTGAN_BOTH int reduce_blocks(bool v_first) const { return int(cdiv(full_count(v_first), kReduced)); }
  // At least one, even of an empty weight: somebody has to write sigma.
  FASTGAN_BOTH int64_t finish_blocks(bool write) const {
    return cdiv(larger(larger(write ? numel() : 0, 1), larger(rows, columns)), kStreamed);
  }
  FASTGAN_BOTH int64_t inner_step() const { return larger(1, cdiv(cdiv(numel(), kSums), kStreamed)) * kStreamed; }
  FASTGAN_BOTH int inner_blocks() const { return int(cdiv(numel(), inner_step())); }
  FASTGAN_BOTH int rectangles_across(int size) const { return int(cdiv(columns, 32 * (16 / size))); }
  FASTGAN_BOTH int64_t rectangles(int size) const { return cdiv(rows, kRectangleRows) * rectangles_across(size); }
  FASTGAN_BOTH int place_in_v(int column) const {
    return inner == columns ? column : column % inner * (columns / inner) + column / inner;
  }
  FASTGAN_BOTH int64_t place(int row, int column) const {
    return int64_t(row) * run + (run == columns ? column : int64_t(column / run) * rows * run + column % run);
  }
};

// What the kernels of an iteration leave each other, by layer.
template <class A> struct Scratch {
  double *squares, *tile_squares;
  A *scales, *y, *x, *pieces;

  FASTGAN_BOTH Scratch(const Layer& layer, bool v_first) {
    squares = static_cast<double*>(layer.scratch);
    tile_squares = squares + layer.product_blocks(v_first);
    scales = reinterpret_cast<A*>(tile_squares + layer.reduce_blocks(v_first));
    y = scales + layer.product_blocks(v_first);
    x = y + layer.own_count(v_first);
    pieces = x + layer.full_count(v_first);
  }
  static int64_t bytes(const Layer& layer, bool v_first) {
    const int64_t blocks = layer.product_blocks(v_first), own = layer.own_count(v_first), full = layer.full_count(v_first);
    const int64_t used = 8 * (blocks + layer.reduce_blocks(v_first)) + int64_t(sizeof(A)) * (blocks + own + full + blocks * full);
    return cdiv(used, 16) * 16;
  }
};

constexpr int kLayers = 128;  // of a launch: they travel as its argument, which CUDA graphs keep, so that nothing is copied
struct Layers {
  int32_t count;
  Layer layer[kLayers];
};

inline int64_t round_up(int64_t count, int64_t to) { return cdiv(count, to) * to; }
inline int64_t power_below(int64_t count) {
  int64_t power = 1;
  while (power * 2 <= count) power *= 2;
  return power;
}

// Of shared memory, for sums over groups of threads that have the same columns; none where a block's threads have one each.
FASTGAN_BOTH inline int64_t partial_bytes(int64_t columns, int64_t accumulated) {
  return columns * accumulated / 16 > kThreads / 2 ? 0 : kThreads * 16;
}

// Of a block: the above, vector and sums over the full indices, own products twice, and the tile.
inline int64_t shared_bytes(int64_t own, int64_t chunk, bool v_first, int64_t size, int64_t accumulated) {
  return partial_bytes(v_first ? own : chunk, accumulated) + 2 * (chunk + round_up(own, 8)) * accumulated + own * chunk * size;
}

// Chooses the layer's tiles, for elements of `size` bytes and blocks of at most `limit` bytes of shared memory; returns theirs.
inline int64_t choose_tiles(Layer& layer, bool v_first, int64_t size, int64_t limit) {
  const int64_t accumulated = size == 8 ? 8 : 4, columns = std::min(kMostColumns, kNarrow / size);
  int64_t chunk = round_up(larger(1, layer.full_count(v_first)), 8);
  int64_t own = power_below(larger(1, std::min<int64_t>(kTileBytes / (chunk * size), layer.own_count(v_first))));
  own = v_first ? std::min(larger(own, 32 / size), columns) : std::min(own, kMostOwn);  // a sector of columns, at least
  layer.tiles = int32_t((v_first ? kOwnColumns : kOwnRows) * (size == 2 ? 2 : 1) / own);
  if (shared_bytes(own, chunk, v_first, size, accumulated) > limit) {
    own = v_first ? columns : kLongRows;
    chunk = kTileBytes / (own * size) / 8 * 8;
    layer.tiles = 1;
  }
  layer.own = int32_t(own), layer.chunk = int32_t(chunk), layer.tiles = int32_t(larger(1, layer.tiles));
  return shared_bytes(own, chunk, v_first, size, accumulated);
}

constexpr int64_t kBusy = 264;  // blocks with a tile each that keep a large GPU busy: two on each of 132 multiprocessors

// Fewer tiles to a block where all layers of a launch together have too few blocks, those with the largest first. A piece is then
// written for each, by way of L2, and DRAM is read by all multiprocessors.
inline void spread(std::vector<Layer>& layers, bool v_first) {
  const auto blocks = [&] {
    int64_t sum = 0;
    for (const Layer& layer : layers) sum += layer.product_blocks(v_first);
    return sum;
  };
  while (blocks() < kBusy) {
    Layer* most = nullptr;
    const auto elements = [&](const Layer& layer) {
      return std::min<int64_t>(int64_t(layer.tiles) * layer.own, layer.own_count(v_first)) * layer.full_count(v_first);
    };
    for (Layer& layer : layers)
      if (layer.tiles > 1 && (!most || elements(layer) > elements(*most))) most = &layer;
    if (!most) break;
    most->tiles = (most->tiles + 1) / 2;
  }
}

int64_t shared_limit(int device);  // bytes, of a block's tile and what goes with it
void launch_forward(const char* op, Dtype dtype, const std::vector<Layer>& layers, const Iteration& iteration, const Target& target, Stream stream);
void launch_backward(const char* op, Dtype dtype, const std::vector<Layer>& layers, const Target& target, Stream stream);

}  // namespace fastgan::spectral_norm
