// Vector clocks: what one thread knows of the progress of others.
//
// Slots of a block's clock are its threads, then AGENTS slots for asynchronous operations, which act on memory
// as threads of their own. A node is never changed once it is shared, so threads that left the same barrier
// share one.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

namespace emulator {

constexpr uint32_t AGENTS = 128;

class Clock {
 public:
  Clock() = default;
  Clock(const Clock &other) : node_(other.node_) {
    if (node_) node_->references++;
  }
  Clock(Clock &&other) noexcept : node_(other.node_) { other.node_ = nullptr; }
  Clock &operator=(Clock other) noexcept {
    std::swap(node_, other.node_);
    return *this;
  }
  ~Clock() { release(); }

  bool empty() const { return !node_; }
  bool same(const Clock &other) const { return node_ == other.node_; }
  const void *identity() const { return node_; }

  // The latest tick of `slot` of the clock's own block that is known.
  uint32_t of(uint32_t slot) const { return node_ && slot < node_->size ? node_->ticks[slot] : 0; }

  // The same for a slot of another block.
  uint32_t of(uint32_t block, uint32_t slot) const {
    if (node_)
      for (const auto &entry : node_->others)
        if (entry.first == block) return entry.second.of(slot);
    return 0;
  }

  void raise(uint32_t slot, uint32_t tick, uint32_t size) {
    if (of(slot) >= tick) return;
    own(size);
    node_->ticks[slot] = tick;
  }

  // Learns all that `other`, a clock of the same block, knows.
  void join(const Clock &other) {
    if (!other.node_ || node_ == other.node_) return;
    if (!node_) {
      *this = other;
      return;
    }
    own(other.node_->size);
    for (uint32_t i = 0; i < other.node_->size; i++)
      if (other.node_->ticks[i] > node_->ticks[i]) node_->ticks[i] = other.node_->ticks[i];
    for (const auto &entry : other.node_->others) learn(entry.first, entry.second, other.node_->size);
  }

  // A clock of block `mine` learns what `other`, a clock of block `theirs`, knows.
  void join_across(uint32_t mine, uint32_t theirs, const Clock &other, uint32_t size) {
    if (!other.node_) return;
    if (mine == theirs) {
      join(other);
      return;
    }
    own(size);
    std::vector<std::pair<uint32_t, Clock>> carried = other.node_->others;
    Clock bare = other;
    if (!carried.empty()) {
      bare.own(other.node_->size);
      bare.node_->others.clear();
    }
    learn(theirs, bare, size);
    for (const auto &entry : carried) {
      if (entry.first == mine)
        join(entry.second);
      else
        learn(entry.first, entry.second, size);
    }
  }

 private:
  struct Node {
    uint32_t references, size;
    std::vector<std::pair<uint32_t, Clock>> others;  // of other blocks; their own `others` are empty
    uint32_t *ticks;
  };
  Node *node_ = nullptr;

  void release() {
    if (node_ && --node_->references == 0) {
      free(node_->ticks);
      delete node_;
    }
  }

  // Makes the node ours alone.
  void own(uint32_t size) {
    if (node_ && node_->references == 1) return;
    Node *fresh = new Node{1, node_ ? node_->size : size, {}, nullptr};
    fresh->ticks = (uint32_t *)calloc(fresh->size, 4);
    if (node_) {
      memcpy(fresh->ticks, node_->ticks, 4 * (size_t)fresh->size);
      fresh->others = node_->others;
    }
    release();
    node_ = fresh;
  }

  void learn(uint32_t block, const Clock &other, uint32_t size) {
    own(size);
    for (auto &entry : node_->others)
      if (entry.first == block) {
        entry.second.join(other);
        return;
      }
    node_->others.emplace_back(block, other);
  }
};

}  // namespace emulator
