#include "ref/add_rows.h"

namespace heed::ref {

// Four rows at a time, for one load and store of y.
template <class Real>
void add_rows_unseen(const Real* a, const int64_t* rows, int64_t n, const Real* x, int64_t pitch, int64_t width,
                     Real* __restrict y) {
  int64_t r = 0;
  for (; r + 4 <= n; r += 4) {
    const Real a0 = a[rows[r]], a1 = a[rows[r + 1]], a2 = a[rows[r + 2]], a3 = a[rows[r + 3]];
    const Real* __restrict x0 = x + rows[r] * pitch;
    const Real* __restrict x1 = x + rows[r + 1] * pitch;
    const Real* __restrict x2 = x + rows[r + 2] * pitch;
    const Real* __restrict x3 = x + rows[r + 3] * pitch;
    for (int64_t c = 0; c < width; ++c) y[c] = y[c] + a0 * x0[c] + a1 * x1[c] + a2 * x2[c] + a3 * x3[c];
  }
  for (; r < n; ++r) {
    const Real a0 = a[rows[r]];
    const Real* __restrict x0 = x + rows[r] * pitch;
    for (int64_t c = 0; c < width; ++c) y[c] += a0 * x0[c];
  }
}

template void add_rows_unseen(const double*, const int64_t*, int64_t, const double*, int64_t, int64_t, double*);
template void add_rows_unseen(const float*, const int64_t*, int64_t, const float*, int64_t, int64_t, float*);

}  // namespace heed::ref
