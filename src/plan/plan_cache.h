// The plan cache: bounded, least recently used out first, shared by all threads. A key is a problem's bytes, what op
// they belong to, and the backend asked for.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "plan/planner.h"

namespace heed {

struct PlanKey {
  const void* op = nullptr;  // an address that only this op has
  std::span<const std::byte> problem;
  std::string_view backend;
};

class PlanCache {
 public:
  explicit PlanCache(int64_t capacity);

  std::shared_ptr<const void> find(const PlanKey& key);  // null: a miss
  // The plan now in the cache: the given one, or one that another thread put there in the meantime.
  std::shared_ptr<const void> insert(const PlanKey& key, std::shared_ptr<const void> plan);
  PlanCacheStats stats();
  void clear();

  // Around fork: a child must not find a lock held by a thread that it does not have.
  void lock_all();
  void unlock_all();

 private:
  struct Entry {
    uint64_t hash;
    const void* op;
    std::vector<std::byte> problem;
    std::string backend;
    std::shared_ptr<const void> plan;
  };
  using Entries = std::list<Entry>;
  using Index = std::unordered_multimap<uint64_t, Entries::iterator>;
  // Threads that run different problems seldom meet at one lock.
  struct alignas(64) Shard {
    std::mutex mutex;
    Entries entries;  // most recently used first
    Index index;
    int64_t hits = 0, misses = 0;
  };

  static uint64_t hash(const PlanKey& key);
  static Entries::iterator lookup(Shard& shard, uint64_t hash, const PlanKey& key);
  Shard& shard_of(uint64_t hash) { return shards_[(hash >> 32) % static_cast<uint64_t>(num_shards_)]; }

  static constexpr int64_t kMaxShards = 16;
  int64_t num_shards_, shard_capacity_;
  std::array<Shard, kMaxShards> shards_;  // of which num_shards_ are used
};

}  // namespace heed
