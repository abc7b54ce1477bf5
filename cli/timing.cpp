#include "timing.h"

#include <algorithm>
#include <cmath>

namespace heed::cli {

Timing summarize(std::vector<double> samples_us) {
  if (samples_us.empty()) return {};
  std::sort(samples_us.begin(), samples_us.end());
  // Linear between the two nearest ranks, as numpy.percentile has it.
  const auto quantile = [&](double fraction) {
    const double rank = fraction * static_cast<double>(samples_us.size() - 1);
    const auto low = static_cast<size_t>(rank);
    const size_t high = std::min(low + 1, samples_us.size() - 1);
    return std::lerp(samples_us[low], samples_us[high], rank - static_cast<double>(low));
  };
  return {quantile(0.5), quantile(0.1), quantile(0.9), static_cast<int>(samples_us.size())};
}

}  // namespace heed::cli
