// The reference's innermost sum.
#pragma once

#include <cstdint>

namespace heed::ref {

// add_rows without the look at the ends; n and width at least 1. Compiled without sanitizers, which would be most of their
// tests' time here.
template <class Real>
void add_rows_unseen(const Real* a, const int64_t* rows, int64_t n, const Real* x, int64_t pitch, int64_t width,
                     Real* y);

// Reads it, whatever the optimiser thinks of that.
template <class Real>
void touch(const Real& x) {
  static_cast<void>(*static_cast<const volatile Real*>(&x));
}

// y[c] += sum over r < n of a[rows[r]] * x[rows[r]][c], c < width, one after another as a textbook sums.
template <class Real>
void add_rows(const Real* a, const int64_t* rows, int64_t n, const Real* x, int64_t pitch, int64_t width, Real* y) {
  if (n == 0 || width == 0) return;
  touch(y[0]), touch(y[width - 1]);
  for (int64_t r = 0; r < n; ++r) {
    const Real* const row = x + rows[r] * pitch;
    touch(a[rows[r]]), touch(row[0]), touch(row[width - 1]);
  }
  add_rows_unseen(a, rows, n, x, pitch, width, y);
}

}  // namespace heed::ref
