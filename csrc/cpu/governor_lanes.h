// Governors judged side by side in the lanes of vector registers.
#pragma once

#include <cstdint>

#include "common/governor_batch.h"
#include "cpu/isa.h"

namespace tolaria::cpu {

#ifdef TOLARIA_HAS_LANES

// As many values in memory as a register of kBytes has lanes. No reference to Real: that would have to be aligned.
template <int kBytes>
struct Cells {
  using Real = typename math::Lanes<kBytes>::Real;
  using Unaligned = typename math::Lanes<kBytes>::Unaligned;

  double* first;

  TOLARIA_INLINE operator Real() const { return *reinterpret_cast<const Unaligned*>(first); }
  TOLARIA_INLINE void operator=(const Real& values) const { *reinterpret_cast<Unaligned*>(first) = values; }
  void operator=(const Cells&) const = delete;
};

// Neighbouring columns of `state`, one in each lane; like math::Governor.
template <int kBytes>
struct LaneGovernors {
  using Real = typename math::Lanes<kBytes>::Real;
  using Mask = decltype(Real{} < Real{});

  double* column;
  int64_t stride;
  int window;

  TOLARIA_INLINE Cells<kBytes> operator[](int f) const { return {column + f * stride}; }
  TOLARIA_INLINE Cells<kBytes> live(int m) const { return (*this)[math::field::count + m]; }
  TOLARIA_INLINE int losses() const { return math::memory::count; }
  TOLARIA_INLINE int gradients() const { return math::memory::count + window; }
};

// kCount neighbouring governors: what is judged, and what came of it.
template <int kCount>
struct GovernorBlock {
  double loss[kCount], is_flagged[kCount], is_active[kCount], gradient_norm[kCount];
  bool has_gradient;
  // The moments of their windows, and whether the step was clean: then it is judged, but for what is left to the caller.
  double mean[kCount], m2[kCount], gradient_mean[kCount], gradient_m2[kCount];
  bool is_clean[kCount];
  // Of a clean step, what its governor's status words said before.
  double reason[kCount], rollback[kCount], tensor_index[kCount];
};

// Judges a block in kVectors registers of kBytes. Their windows are summed in turn, since each sum waits for its own
// divisions: in a loop of its own, 1,024 governors took 20 us by four registers, 28 by two and 49 by one (Zen 3, AVX2). A
// clean step reads 264 bytes of a governor and writes 360, on 400 bytes in all.
template <int kBytes, int kVectors>
struct JudgeLanes {
  using Column = LaneGovernors<kBytes>;
  using Real = typename Column::Real;
  using Moments = math::Moments<Real>;
  static constexpr int kLanes = math::Lanes<kBytes>::kCount;
  static constexpr int kCount = kVectors * kLanes;
  using Block = GovernorBlock<kCount>;

  static TOLARIA_INLINE void run(const GovernorBatch& batch, const double* c, int64_t begin, Block& block) {
    Column columns[kVectors];
    for (int v = 0; v < kVectors; ++v) columns[v] = {batch.state + begin + v * kLanes, batch.stride, batch.window};
    Moments m[kVectors], of_gradients[kVectors];
    window_moments(columns, math::memory::history_size, columns[0].losses(), m);
    if (block.has_gradient) {
      window_moments(columns, math::memory::gradient_size, columns[0].gradients(), of_gradients);
    } else {
      for (Moments& none : of_gradients) none = {Real{}, Real{}};
    }
    for (int v = 0; v < kVectors; ++v) {
      const int at = v * kLanes;
      lanes(block.mean, at) = m[v].mean;
      lanes(block.m2, at) = m[v].m2;
      lanes(block.gradient_mean, at) = of_gradients[v].mean;
      lanes(block.gradient_m2, at) = of_gradients[v].m2;
      const bool is_clean = judge_clean(columns[v], c, block, at, m[v], of_gradients[v]);
      for (int l = 0; l < kLanes; ++l) block.is_clean[at + l] = is_clean;
    }
  }

  static TOLARIA_INLINE Cells<kBytes> lanes(double* values, int at) { return {values + at}; }

  // As math::window_moments, for windows of any lengths.
  static TOLARIA_INLINE void window_moments(const Column* g, int size_field, int first, Moments* moments) {
    Moments m[kVectors];
    Real sizes[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      m[v] = {Real{}, Real{}};
      sizes[v] = g[v].live(size_field);
    }
    for (int i = 0; i < g[0].window; ++i) {
      const Real count = math::spread<Real>(i + 1.0);
      for (int v = 0; v < kVectors; ++v) {
        const Moments next = math::welford<Real>(m[v], g[v].live(first + i), count);
        const auto inside = count <= sizes[v];
        m[v] = {math::select(inside, next.mean, m[v].mean), math::select(inside, next.m2, m[v].m2)};
      }
    }
    for (int v = 0; v < kVectors; ++v) moments[v] = m[v];
  }

  // What math::judge does where every loss, and every gradient that is given, joins the healthy ones; else nothing. The
  // slots, the mailbox and the new ends of the windows are left to the caller.
  static TOLARIA_INLINE bool judge_clean(const Column& g, const double* c, Block& block, int at, const Moments& m,
                                         const Moments& of_gradients) {
    const Real active = lanes(block.is_active, at), flagged = lanes(block.is_flagged, at);
    const math::Sample<Column> s{lanes(block.loss, at), flagged != 0.0, block.has_gradient,
                                 lanes(block.gradient_norm, at), typename Column::Mask{}};
    const math::Findings<Column> f = math::find(g, c, s, m, of_gradients);
    typename Column::Mask is_clean = (active != 0.0) & f.joins() & !f.suspected;
    if (s.has_gradient) is_clean &= f.judges_gradient;
    if (math::any(!is_clean)) return false;
    lanes(block.reason, at) = static_cast<Real>(g[math::field::reason]);
    lanes(block.rollback, at) = static_cast<Real>(g[math::field::rollback]);
    lanes(block.tensor_index, at) = static_cast<Real>(g[math::field::tensor_index]);
    math::write_verdict(g, s, m, f, math::kHealthy, false);
    math::shift_full(g, math::memory::history_size, g.losses());
    if (s.has_gradient) math::shift_full(g, math::memory::gradient_size, g.gradients());
    math::accept(g, c, s.loss, f);
    math::remember(g, c, f, s.loss);
    g[math::field::panics] = Real{};
    g[math::field::restore_order] = Real{};
    return true;
  }
};

#endif

}  // namespace tolaria::cpu
