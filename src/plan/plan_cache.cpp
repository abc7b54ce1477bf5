#include "plan/plan_cache.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstring>
#include <new>

#include "base/config.h"
#include "base/fork.h"

namespace heed {
namespace {

constexpr int64_t kMinShardCapacity = 64;  // below that one shard: exactly least recently used

uint64_t word_at(const std::byte* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, sizeof word);
  return word;
}

uint64_t mix(uint64_t state, uint64_t word) { return (std::rotl(state, 23) ^ word) * 0x9E3779B97F4A7C15u; }

PlanCache& plan_cache();

// The process's cache. When the process exits, or the library is unloaded, the plans are freed; the cache itself is never
// destroyed, because other threads may still be computing then.
struct GlobalCache {
  alignas(PlanCache) std::byte memory[sizeof(PlanCache)];
  PlanCache* const cache = new (memory) PlanCache(config().plan_cache);

  GlobalCache() { add_fork_hook(hook); }
  ~GlobalCache() { cache->clear(); }

  static constinit ForkHook hook;
};
constinit ForkHook GlobalCache::hook = {[] { plan_cache().lock_all(); }, [] { plan_cache().unlock_all(); },
                                        [] { plan_cache().unlock_all(); }};

PlanCache& plan_cache() {
  static constinit std::atomic<bool> ready{false};
  return *made_once(ready, []() -> GlobalCache& {
            static GlobalCache global;
            return global;
          }).cache;
}

}  // namespace

PlanCache::PlanCache(int64_t capacity)
    : num_shards_(std::clamp<int64_t>(capacity / kMinShardCapacity, 1, kMaxShards)),
      shard_capacity_(capacity / num_shards_) {}

// Four chains of multiplications side by side: a problem is some hundred words, and one chain would wait for each.
uint64_t PlanCache::hash(const PlanKey& key) {
  std::array<uint64_t, 4> lanes = {1, 2, 3, 4};
  const std::byte* bytes = key.problem.data();
  size_t left = key.problem.size();
  for (; left >= 32; left -= 32, bytes += 32) {
    for (size_t i = 0; i < 4; ++i) lanes[i] = mix(lanes[i], word_at(bytes + 8 * i));
  }
  for (; left >= 8; left -= 8, bytes += 8) lanes[0] = mix(lanes[0], word_at(bytes));
  for (; left > 0; --left, ++bytes) lanes[1] = mix(lanes[1], static_cast<uint64_t>(*bytes));
  for (const char c : key.backend) lanes[2] = mix(lanes[2], static_cast<unsigned char>(c));
  uint64_t h = reinterpret_cast<uintptr_t>(key.op);
  for (const uint64_t lane : lanes) h = mix(h, lane ^ lane >> 32);
  return h ^ h >> 29;
}

PlanCache::Entries::iterator PlanCache::lookup(Shard& shard, uint64_t hash, const PlanKey& key) {
  const auto [first, last] = shard.index.equal_range(hash);
  for (auto it = first; it != last; ++it) {
    const Entry& entry = *it->second;
    if (entry.op == key.op && entry.backend == key.backend && entry.problem.size() == key.problem.size() &&
        std::memcmp(entry.problem.data(), key.problem.data(), key.problem.size()) == 0) {
      return it->second;
    }
  }
  return shard.entries.end();
}

std::shared_ptr<const void> PlanCache::find(const PlanKey& key) {
  const uint64_t h = hash(key);
  Shard& shard = shard_of(h);
  const std::lock_guard lock(shard.mutex);
  const auto entry = lookup(shard, h, key);
  if (entry == shard.entries.end()) {
    ++shard.misses;
    return nullptr;
  }
  ++shard.hits;
  if (entry != shard.entries.begin()) shard.entries.splice(shard.entries.begin(), shard.entries, entry);
  return entry->plan;
}

std::shared_ptr<const void> PlanCache::insert(const PlanKey& key, std::shared_ptr<const void> plan) {
  if (shard_capacity_ <= 0) return plan;
  const uint64_t h = hash(key);
  Shard& shard = shard_of(h);
  Entries added, evicted;  // made and freed outside the lock
  added.push_back({h, key.op, {key.problem.begin(), key.problem.end()}, std::string(key.backend), plan});
  const std::lock_guard lock(shard.mutex);
  if (const auto entry = lookup(shard, h, key); entry != shard.entries.end()) return entry->plan;
  shard.index.emplace(h, added.begin());
  shard.entries.splice(shard.entries.begin(), added);
  if (static_cast<int64_t>(shard.entries.size()) > shard_capacity_) {
    const auto oldest = std::prev(shard.entries.end());
    const auto [first, last] = shard.index.equal_range(oldest->hash);
    shard.index.erase(std::find_if(first, last, [&](const auto& item) { return item.second == oldest; }));
    evicted.splice(evicted.begin(), shard.entries, oldest);
  }
  return plan;
}

PlanCacheStats PlanCache::stats() {
  PlanCacheStats total;
  total.capacity = shard_capacity_ * num_shards_;
  for (Shard& shard : shards_) {
    const std::lock_guard lock(shard.mutex);
    total.hits += shard.hits;
    total.misses += shard.misses;
    total.entries += static_cast<int64_t>(shard.entries.size());
  }
  return total;
}

void PlanCache::clear() {
  for (Shard& shard : shards_) {
    Entries entries;  // destroyed after the lock is released
    Index index;
    const std::lock_guard lock(shard.mutex);
    entries.swap(shard.entries);
    index.swap(shard.index);  // not clear(): that would keep the table's memory
    shard.hits = shard.misses = 0;
  }
}

void PlanCache::lock_all() {
  for (Shard& shard : shards_) shard.mutex.lock();
}

void PlanCache::unlock_all() {
  for (Shard& shard : shards_) shard.mutex.unlock();
}

template <class Problem>
Result<std::shared_ptr<const Plan<Problem>>> cached_plan(const Problem& problem, std::string_view backend) {
  static constexpr char kOp = 0;
  const PlanKey key{&kOp, std::as_bytes(std::span(&problem, 1)), backend};
  if (std::shared_ptr<const void> plan = plan_cache().find(key)) {
    return std::static_pointer_cast<const Plan<Problem>>(std::move(plan));
  }
  Result<std::shared_ptr<const Plan<Problem>>> made = make_plan(problem, backend);
  if (!made.ok()) return made;
  return std::static_pointer_cast<const Plan<Problem>>(plan_cache().insert(key, std::move(made).value()));
}

template Result<std::shared_ptr<const Plan<AttentionProblem>>> cached_plan(const AttentionProblem&, std::string_view);
template Result<std::shared_ptr<const Plan<KvAppendProblem>>> cached_plan(const KvAppendProblem&, std::string_view);

PlanCacheStats plan_cache_stats() { return plan_cache().stats(); }
void plan_cache_clear() { plan_cache().clear(); }

}  // namespace heed
