#include "memory.h"

#include <sys/mman.h>

#include <atomic>
#include <memory>
#include <new>

namespace amtss {
namespace {

constexpr int64_t large_page = 2 << 20;

// Exchanged atomically, without a lock: a child of fork() could inherit a locked one.
std::atomic<Block*> kept{nullptr};

}  // namespace

Block::Block(int64_t wanted) : bytes((wanted + 4095) / 4096 * 4096) {
    void* const mapped = mmap(nullptr, bytes + large_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    const int64_t before = -reinterpret_cast<uintptr_t>(mapped) % large_page;
    memory = static_cast<char*>(mapped) + before;
    if (before > 0) munmap(mapped, before);
    munmap(memory + bytes, large_page - before);
#if defined(MADV_HUGEPAGE)
    // A hint. Without large pages, allocation only takes longer.
    madvise(memory, bytes, MADV_HUGEPAGE);
#endif
}

Block::~Block() { munmap(memory, bytes); }

Block* take_block(int64_t bytes) {
    std::unique_ptr<Block> block(kept.exchange(nullptr));
    if (block && block->bytes >= bytes && block->bytes <= 2 * bytes) return block.release();
    block.reset();
    return new Block(bytes);
}

void give_block(Block* block) {
#if defined(MADV_FREE)
    // Only large pages: the small ones at the end would take as long as all of these.
    madvise(block->memory, block->bytes / large_page * large_page, MADV_FREE);
#endif
    delete kept.exchange(block);
}

void release_kept() { delete kept.exchange(nullptr); }

}  // namespace amtss
