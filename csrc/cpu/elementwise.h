// Drivers of the elementwise kernels: how (outer, mid, inner) is cut into pieces, the same for any number of threads.
//
// An op is a struct of pointers with two members, both TOLARIA_INLINE:
//   void uniform(int64_t slot, int64_t offset, int64_t n, acc_t alpha)          one alpha for n elements
//   void varied(int64_t group, int64_t row, int64_t rows, int64_t mid,          `rows` rows of n elements, each element
//               int64_t start, int64_t n, const acc_t* alpha)                   with an alpha of its own
#pragma once

#include <ATen/Parallel.h>
#include <algorithm>
#include <cstdint>

#include "common/fresh.h"
#include "common/layout.h"
#include "cpu/isa.h"
#include "cpu/stream.h"

namespace tolaria::cpu {

// Elements handed to a thread at the least: below this the wake-up costs more than the work.
inline constexpr int64_t kGrain = 32768;
// Elements of a piece with one alpha, and of a tile with many: the unit of a partial sum.
inline constexpr int64_t kPiece = 32768;
// Widest run of alpha values in a tile.
inline constexpr int64_t kTileWidth = 1024;

// Pieces of rows that share one alpha: piece p is part p % parts of row p / parts. A piece's slot is its place in an
// array of (outer, parts, mid) partial sums.
struct UniformPieces {
  int64_t row_length, mid, parts, count;

  explicit UniformPieces(const AlphaLayout& layout)
      : row_length(layout.inner),
        mid(layout.mid),
        parts((layout.inner + kPiece - 1) / kPiece),
        count(layout.outer * layout.mid * parts) {}

  int64_t grain() const { return std::max<int64_t>(1, kGrain / std::min(row_length, kPiece)); }
};

// Tiles of `rows` outer rows by at most kTileWidth alpha values: tile t is strip t % strips of group t / strips.
struct VariedTiles {
  int64_t outer, mid, width, strips, rows, groups, count;

  explicit VariedTiles(const AlphaLayout& layout)
      : outer(layout.outer),
        mid(layout.mid),
        width(std::min(layout.mid, kTileWidth)),
        strips((layout.mid + width - 1) / width),
        rows(std::max<int64_t>(1, kPiece / width)),
        groups((layout.outer + rows - 1) / rows),
        count(groups * strips) {}

  int64_t grain() const { return std::max<int64_t>(1, kGrain / (width * std::min(rows, outer))); }
};

template <class Op, typename acc_t>
struct UniformLoop {
  static TOLARIA_INLINE void run(const UniformPieces& pieces, int64_t begin, int64_t end, const acc_t* alpha,
                                 const Op& op) {
    int64_t row = begin / pieces.parts, part = begin % pieces.parts;
    int64_t outer = row / pieces.mid, index = row % pieces.mid;
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t start = part * kPiece, slot = (outer * pieces.parts + part) * pieces.mid + index;
      op.uniform(slot, row * pieces.row_length + start, std::min(kPiece, pieces.row_length - start), alpha[index]);
      if (++part == pieces.parts) {
        part = 0;
        ++row;
        if (++index == pieces.mid) {
          index = 0;
          ++outer;
        }
      }
    }
  }
};

template <class Op, typename acc_t>
struct VariedLoop {
  static TOLARIA_INLINE void run(const VariedTiles& tiles, int64_t begin, int64_t end, const acc_t* alpha,
                                 const Op& op) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t group = tile / tiles.strips, start = (tile % tiles.strips) * tiles.width, row = group * tiles.rows;
      op.varied(group, row, std::min(tiles.rows, tiles.outer - row), tiles.mid, start,
                std::min(tiles.width, tiles.mid - start), alpha + start);
    }
  }
};

// Runs the op over every element, on all threads.
template <typename acc_t, class Op>
void for_each_run(const AlphaLayout& layout, const Op& op) {
  const acc_t* alpha = layout.values.const_data_ptr<acc_t>();
  if (layout.is_uniform()) {
    const UniformPieces pieces(layout);
    at::parallel_for(0, pieces.count, pieces.grain(), [&](int64_t begin, int64_t end) {
      vectorised<UniformLoop<Op, acc_t>>(pieces, begin, end, alpha, op);
    });
  } else {
    const VariedTiles tiles(layout);
    at::parallel_for(0, tiles.count, tiles.grain(), [&](int64_t begin, int64_t end) {
      vectorised<VariedLoop<Op, acc_t>>(tiles, begin, end, alpha, op);
    });
  }
}

// The values of `tensor` in fresh memory of the same order.
inline at::Tensor copy_of(const at::Tensor& tensor) {
  at::Tensor copy = fresh_like(tensor);
  if (!tensor.is_non_overlapping_and_dense()) return copy.copy_(tensor);
  const int64_t bytes = static_cast<int64_t>(tensor.nbytes()), piece = kGrain * 4;
  const auto* source = static_cast<const char*>(tensor.const_data_ptr());
  auto* target = static_cast<char*>(copy.mutable_data_ptr());
  const auto copy_run = outgrows_caches(2 * bytes) ? &stream_run : &plain_run;
  at::parallel_for(0, (bytes + piece - 1) / piece, 1, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * piece;
    copy_run(target + from, source + from, std::min(bytes, end * piece) - from);
  });
  return copy;
}

// Sums rows of partial sums, row after row: out[m] = sum over r of partial[r * mid + m], whatever the thread count.
inline void sum_rows(const double* partial, int64_t rows, int64_t mid, double* out) {
  at::parallel_for(0, mid, std::max<int64_t>(1, kGrain / std::max<int64_t>(rows, 1)), [&](int64_t begin, int64_t end) {
    std::fill(out + begin, out + end, 0.0);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t m = begin; m < end; ++m) out[m] += partial[r * mid + m];
    }
  });
}

}  // namespace tolaria::cpu
